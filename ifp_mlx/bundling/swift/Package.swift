// swift-tools-version: 6.0
import PackageDescription

// IFPBundle and ifp-bundle need no Apple framework: they were compiled and tested with
// Swift 6.0 on Linux. IFPProvider was neither compiled nor run: it needs a Mac, and the
// SDK of iOS or macOS 27.
let package = Package(
    name: "IFPBundle",
    platforms: [.macOS(.v14), .iOS(.v17)],
    products: [.library(name: "IFPBundle", targets: ["IFPBundle"])],
    targets: [
        .target(name: "IFPBundle"),
        .executableTarget(name: "ifp-bundle", dependencies: ["IFPBundle"]),
        .testTarget(name: "IFPBundleTests", dependencies: ["IFPBundle"]),
    ]
)

#if os(macOS)
    package.products += [.library(name: "IFPProvider", targets: ["IFPProvider"])]
    package.dependencies += [
        // A release after 3.31.4, once there is one: it reads the files that an index
        // names, and has MLXFoundationModels.
        .package(
            url: "https://github.com/ml-explore/mlx-swift-lm",
            revision: "14414441fa44f45eee35a61e9fa0bab577cf9734"),
        .package(url: "https://github.com/huggingface/swift-transformers", from: "1.3.0"),
    ]
    package.targets += [
        .target(
            name: "IFPProvider",
            dependencies: [
                "IFPBundle",
                .product(name: "MLXFoundationModels", package: "mlx-swift-lm"),
                .product(name: "MLXHuggingFace", package: "mlx-swift-lm"),
                .product(name: "MLXLLM", package: "mlx-swift-lm"),
                .product(name: "MLXLMCommon", package: "mlx-swift-lm"),
                .product(name: "Tokenizers", package: "swift-transformers"),
            ])
    ]
#endif
