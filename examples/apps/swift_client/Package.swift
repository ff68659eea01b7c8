// swift-tools-version: 5.9
import PackageDescription

let package = Package(
    name: "ifp-chat",
    platforms: [.macOS(.v13), .iOS(.v16)],
    targets: [.executableTarget(name: "ifp-chat")]
)
