import Foundation

/// A bundle made by `ifp_mlx bundle`: which parts a task needs, whether they are there and
/// whole, and the folder that a model loader reads.
public struct ModelBundle: Sendable {
    public let metadata: Metadata
    private let locate: @Sendable (String) throws -> URL

    /// Opens a bundle whose files lie together in one folder.
    public init(folder: URL) throws {
        let json = try Data(contentsOf: folder.appendingPathComponent("metadata.json"))
        try self.init(json: json) { folder.appendingPathComponent($0) }
    }

    /// Opens a bundle whose files lie anywhere, as those of asset packs do.
    ///
    /// - Parameters:
    ///   - json: its `metadata.json`.
    ///   - locate: returns where a file is, given its path in the bundle.
    public init(json: Data, locate: @escaping @Sendable (String) throws -> URL) throws {
        metadata = try Metadata(json: json)
        self.locate = locate
    }

    /// Returns the task that a session's instructions are for: the one whose instruction
    /// they are, or that they name; `nil` if there is none.
    public func task(for instructions: String) -> String? {
        let words = Self.words(instructions)
        let tasks = metadata.tasks.sorted { $0.key < $1.key }
        let same = tasks.first { $0.value.instruction.map(Self.words) == words }
        return same?.key ?? tasks.first { [Substring($0.key)] == words }?.key
    }

    /// Returns what a task needs, by name, the core first.
    public func parts(of task: String) throws -> [(name: String, part: Metadata.Part)] {
        guard let found = metadata.tasks[task] else {
            let known = metadata.tasks.keys.sorted().joined(separator: ", ")
            throw BundleError("There is no task \(task); there are \(known).")
        }
        return found.parts.map { ($0, metadata.parts[$0]!) }
    }

    /// Returns the parts of a task that are not on the device: their asset packs are to be
    /// fetched. One that is `essential` should be there; the network can have failed.
    public func missing(for task: String) throws -> [Metadata.Part] {
        try parts(of: task).map(\.part).filter { !isThere($0) }
    }

    /// Returns the files of a part that have changed; reads all of them.
    public func damaged(_ part: Metadata.Part) -> [String] {
        part.files.sorted { $0.key < $1.key }.compactMap { path, file in
            guard let url = try? locate(path), size(of: url) == file.bytes,
                (try? SHA256.of(file: url)) == file.sha256
            else { return path }
            return nil
        }
    }

    /// Lays the files of a task into one folder, as links, for a loader to read.
    ///
    /// Make it anew whenever the app starts: the system may move asset packs.
    ///
    /// - Parameters:
    ///   - task: its name.
    ///   - folder: where the folder is made, such as the app's caches.
    /// - Returns: the folder; its name tells these weights from all others.
    public func assemble(_ task: String, in folder: URL) throws -> URL {
        let parts = try parts(of: task).map(\.part)
        if let lost = parts.first(where: { !isThere($0) }) {
            throw BundleError("The asset pack \(lost.assetPack) is not here; fetch it first.")
        }
        let name = [task, metadata.tasks[task]?.identity].compactMap { $0 }.joined(separator: "-")
        let made = folder.appendingPathComponent(metadata.name).appendingPathComponent(name)
        let manager = FileManager.default
        try? manager.removeItem(at: made)
        for part in parts {
            for path in part.files.keys {
                let link = made.appendingPathComponent(String(path.dropFirst(part.folder.count + 1)))
                try manager.createDirectory(
                    at: link.deletingLastPathComponent(), withIntermediateDirectories: true)
                try manager.createSymbolicLink(at: link, withDestinationURL: try locate(path))
            }
        }
        return made
    }

    private func isThere(_ part: Metadata.Part) -> Bool {
        part.files.allSatisfy { path, file in
            (try? locate(path)).map { size(of: $0) == file.bytes } ?? false
        }
    }

    private func size(of url: URL) -> Int? {
        let found = url.resolvingSymlinksInPath().path
        return try? FileManager.default.attributesOfItem(atPath: found)[.size] as? Int
    }

    private static func words(_ text: String) -> [Substring] {
        text.split(whereSeparator: \.isWhitespace)
    }
}
