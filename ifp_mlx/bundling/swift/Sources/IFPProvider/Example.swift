// What an app writes: a session with a bundle's task. Neither compiled nor run: see
// BundleLanguageModel.swift.
#if canImport(FoundationModels, _version: 2)
    import Foundation
    import FoundationModels
    import IFPBundle

    /// Answers with a bundle in the app's own resources, or beside it.
    @available(iOS 27.0, macOS 27.0, visionOS 27.0, *)
    func answer(_ prompt: String, instructions: String, bundleAt folder: URL) async throws -> String {
        let model = BundleLanguageModel(bundle: try ModelBundle(folder: folder))
        let session = LanguageModelSession(model: model, instructions: instructions)
        session.prewarm()  // chooses the task and loads it, while the user still types
        return try await session.respond(to: prompt).content
    }

    /// Streams an answer with a bundle that arrives as asset packs.
    @available(iOS 27.0, macOS 27.0, visionOS 27.0, *)
    func stream(_ prompt: String, instructions: String, bundle name: String) async throws {
        let bundle = try await AssetPacks.bundle(named: name)
        let model = BundleLanguageModel(bundle: bundle, fetch: AssetPacks.fetch)
        let session = LanguageModelSession(model: model, instructions: instructions)
        session.prewarm()
        for try await partial in session.streamResponse(to: prompt) { print(partial.content) }
    }
#endif
