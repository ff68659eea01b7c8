// A bundle that arrives as Apple-hosted asset packs. Neither compiled nor run: written on
// Linux from Apple's documentation. It needs iOS or macOS 26.
#if canImport(BackgroundAssets)
    import BackgroundAssets
    import Foundation
    import IFPBundle
    import System

    @available(iOS 26.0, macOS 26.0, visionOS 26.0, *)
    public enum AssetPacks {
        /// Opens the bundle of that name; its `metadata.json` is a small essential pack.
        public static func bundle(named name: String) async throws -> ModelBundle {
            try await ensure(name)
            let json = try AssetPackManager.shared.contents(
                at: FilePath("\(name)/metadata.json"), searchingInAssetPackWithID: name)
            return try ModelBundle(json: json) { path in
                try AssetPackManager.shared.url(for: FilePath("\(name)/\(path)"))
            }
        }

        /// Fetches parts that are not on the device, one after the other.
        @Sendable public static func fetch(_ parts: [Metadata.Part]) async throws {
            for part in parts { try await ensure(part.assetPack) }
        }

        /// Frees the space of a task. What is essential stays.
        public static func remove(_ task: String, of bundle: ModelBundle) async throws {
            for (_, part) in try bundle.parts(of: task) where part.download != .essential {
                try await AssetPackManager.shared.remove(assetPackWithID: part.assetPack)
            }
        }

        private static func ensure(_ id: String) async throws {
            let pack = try await AssetPackManager.shared.assetPack(withID: id)
            try await AssetPackManager.shared.ensureLocalAvailability(of: pack)
        }
    }
#endif
