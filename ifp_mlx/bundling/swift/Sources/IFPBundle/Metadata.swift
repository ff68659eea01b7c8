import Foundation

/// The content of a bundle's `metadata.json`; `metadata.schema.json` explains it.
public struct Metadata: Decodable, Sendable {
    public static let format = "ifp_mlx.bundle.1"

    public enum Kind: String, Decodable, Sendable { case mlx, coreml }

    /// When the system fetches a part: Background Assets' download policy.
    public enum Download: String, Decodable, Sendable { case essential, prefetch, onDemand }

    public struct BaseModel: Decodable, Sendable {
        public let name: String?
        public let source: String?
        public let license: String?
        /// Texts in the bundle that the app has to show or pass on.
        public let licenseFiles: [String]

        enum CodingKeys: String, CodingKey {
            case name, source, license
            case licenseFiles = "license_files"
        }
    }

    /// What the app can do with the bundle. Not called `Task`, which Swift has.
    public struct ModelTask: Decodable, Sendable {
        public let instruction: String?
        public let maskID: String?
        /// Names the weights: a KV cache belongs to it.
        public let identity: String?
        public let keep: Double?
        public let agreement: Double?
        /// Of a Core ML package: `MLModelConfiguration.functionName`.
        public let function: String?
        public let parts: [String]

        enum CodingKeys: String, CodingKey {
            case instruction, identity, keep, agreement, function, parts
            case maskID = "mask_id"
        }
    }

    public struct File: Decodable, Sendable {
        public let bytes: Int
        public let sha256: String
    }

    /// Files that are downloaded together.
    public struct Part: Decodable, Sendable {
        public let download: Download
        public let assetPack: String
        public let folder: String
        public let bytes: Int
        /// By the path in the bundle.
        public let files: [String: File]

        enum CodingKeys: String, CodingKey {
            case download, folder, bytes, files
            case assetPack = "asset_pack"
        }
    }

    public let format: String
    public let name: String
    public let version: String
    public let kind: Kind
    public let minimumOS: [String: String]
    public let bytes: Int
    public let baseModel: BaseModel
    public let contextLength: Int?
    public let tasks: [String: ModelTask]
    public let parts: [String: Part]

    enum CodingKeys: String, CodingKey {
        case format, name, version, kind, bytes, tasks, parts
        case minimumOS = "minimum_os"
        case baseModel = "base_model"
        case contextLength = "context_length"
    }

    /// Decodes and checks it.
    ///
    /// - Throws: ``BundleError`` on another format, or on paths that leave the bundle.
    public init(json: Data) throws {
        let said = try JSONDecoder().decode(Format.self, from: json)
        guard said.format == Self.format else {
            throw BundleError("\(said.format) is another format than \(Self.format).")
        }
        self = try JSONDecoder().decode(Self.self, from: json)
        for (name, part) in parts {
            for path in part.files.keys {
                let steps = path.split(separator: "/", omittingEmptySubsequences: false)
                let inside = path.hasPrefix(part.folder + "/")
                guard inside, !steps.contains(".."), !steps.contains("") else {
                    throw BundleError("\(path) is not inside the part \(name).")
                }
            }
        }
        for (name, task) in tasks {
            for part in task.parts where parts[part] == nil {
                throw BundleError("The task \(name) needs the part \(part), which is not there.")
            }
        }
    }

    private struct Format: Decodable { let format: String }
}

/// One sentence that says what is wrong.
public struct BundleError: LocalizedError, Equatable {
    public let sentence: String
    public init(_ sentence: String) { self.sentence = sentence }
    public var errorDescription: String? { sentence }
}
