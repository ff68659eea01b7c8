// A Foundation Models provider that chooses the task of a bundle by the instructions.
// Neither compiled nor run: written on Linux from Apple's documentation and from
// mlx-swift-lm's sources (commit in Package.swift). It needs the SDK of iOS or macOS 27.
#if canImport(FoundationModels, _version: 2)
    import Foundation
    import FoundationModels
    import IFPBundle
    import MLXFoundationModels
    import MLXHuggingFace
    import MLXLLM
    import MLXLMCommon
    import Tokenizers

    /// A bundle as a language model: the instructions of a session say which task answers.
    ///
    /// The choice is made in `prewarm`, which a session calls before its first prompt. The
    /// task's parts are fetched, laid into one folder and loaded while the user types.
    @available(iOS 27.0, macOS 27.0, visionOS 27.0, *)
    public struct BundleLanguageModel: LanguageModel {
        public let bundle: ModelBundle
        /// Answers to instructions of no task; `nil`: they are an error.
        public let fallback: String?
        /// Makes parts available, for instance ``AssetPacks/fetch(_:)``.
        let fetch: @Sendable ([Metadata.Part]) async throws -> Void

        public init(
            bundle: ModelBundle, fallback: String? = nil,
            fetch: @escaping @Sendable ([Metadata.Part]) async throws -> Void = { _ in }
        ) {
            (self.bundle, self.fallback, self.fetch) = (bundle, fallback, fetch)
        }

        public var capabilities: LanguageModelCapabilities {
            LanguageModelCapabilities([.guidedGeneration])
        }

        public var executorConfiguration: Executor.Configuration {
            Executor.Configuration(bundle: bundle.metadata.name, version: bundle.metadata.version)
        }

        public struct Executor: LanguageModelExecutor {
            public typealias Model = BundleLanguageModel

            /// The framework keeps one executor for each.
            public struct Configuration: Hashable, Sendable {
                let bundle: String
                let version: String
            }

            private let resident = Resident()

            public init(configuration: Configuration) throws {}

            public func prewarm(model: BundleLanguageModel, transcript: Transcript) {
                Task {
                    // What fails here fails again in respond, which can say so.
                    try? await resident.model(for: transcript, of: model).preload()
                }
            }

            public func respond(
                to request: LanguageModelExecutorGenerationRequest,
                model: BundleLanguageModel,
                streamingInto channel: LanguageModelExecutorGenerationChannel
            ) async throws {
                let chosen = try await resident.model(for: request.transcript, of: model)
                let executor = try MLXLanguageModel.Executor(
                    configuration: chosen.executorConfiguration)
                try await executor.respond(to: request, model: chosen, streamingInto: channel)
            }
        }
    }

    /// The one task whose weights are in memory.
    @available(iOS 27.0, macOS 27.0, visionOS 27.0, *)
    private actor Resident {
        private var task: String?
        private var work: Task<MLXLanguageModel, Error>?

        /// Returns the model that a transcript's instructions ask for; lets the last one go.
        ///
        /// A prompt that comes while `prewarm` still fetches waits for the same work.
        func model(
            for transcript: Transcript, of model: BundleLanguageModel
        ) async throws -> MLXLanguageModel {
            let instructions = Self.instructions(in: transcript)
            guard let wanted = model.bundle.task(for: instructions) ?? model.fallback else {
                throw BundleError("No task is for these instructions: \(instructions)")
            }
            if wanted == task, let work { return try await work.value }
            let (last, coming) = (work, Task { try await Self.make(wanted, of: model) })
            (task, work) = (wanted, coming)
            await (try? last?.value)?.evict()
            do {
                return try await coming.value
            } catch {
                if task == wanted { work = nil }  // the next prompt tries again
                throw error
            }
        }

        private static func make(
            _ task: String, of model: BundleLanguageModel
        ) async throws -> MLXLanguageModel {
            try await model.fetch(model.bundle.missing(for: task))
            let caches = FileManager.default.urls(for: .cachesDirectory, in: .userDomainMask)[0]
            let folder = try model.bundle.assemble(task, in: caches)
            return MLXLanguageModel(
                configuration: ModelConfiguration(directory: folder),
                weightsLocation: { _ in folder },
                load: { _, _ in
                    try await loadModelContainer(from: folder, using: #huggingFaceTokenizerLoader())
                })
        }

        private static func instructions(in transcript: Transcript) -> String {
            for case .instructions(let entry) in transcript {
                let texts = entry.segments.compactMap { segment -> String? in
                    if case .text(let text) = segment { text.content } else { nil }
                }
                return texts.joined(separator: "\n")
            }
            return ""
        }
    }
#endif
