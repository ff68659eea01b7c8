// swift-tools-version: 6.1
import PackageDescription

let package = Package(
    name: "compact-chat",
    platforms: [.macOS(.v14), .iOS(.v17)],
    dependencies: [
        // A release after 3.31.4, once there is one: see README.md.
        .package(
            url: "https://github.com/ml-explore/mlx-swift-lm",
            revision: "14414441fa44f45eee35a61e9fa0bab577cf9734"),
        .package(url: "https://github.com/huggingface/swift-transformers", from: "1.3.0"),
    ],
    targets: [
        .executableTarget(
            name: "compact-chat",
            dependencies: [
                .product(name: "MLXLLM", package: "mlx-swift-lm"),
                .product(name: "MLXLMCommon", package: "mlx-swift-lm"),
                .product(name: "MLXHuggingFace", package: "mlx-swift-lm"),
                .product(name: "Tokenizers", package: "swift-transformers"),
            ])
    ]
)
