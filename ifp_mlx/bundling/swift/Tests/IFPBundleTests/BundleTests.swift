import Foundation
import XCTest

@testable import IFPBundle

final class BundleTests: XCTestCase {
    private var root: URL!

    override func setUpWithError() throws {
        root = FileManager.default.temporaryDirectory.appendingPathComponent(UUID().uuidString)
        try write(metadata(), to: "metadata.json")
        try write("shared", to: "core/config.json")
        try write("salut", to: "tasks/french/model-french.safetensors")
    }

    override func tearDownWithError() throws {
        try FileManager.default.removeItem(at: root)
    }

    func testADigestIsThatOfTheStandard() {
        var none = SHA256()
        XCTAssertEqual(
            none.finish(), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
        var abc = SHA256()
        for letter in ["a", "b", "c"] { abc.update(Data(letter.utf8)) }
        XCTAssertEqual(
            abc.finish(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
        var million = SHA256()
        for _ in 0..<1000 { million.update(Data(repeating: 97, count: 1000)) }
        XCTAssertEqual(
            million.finish(), "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0")
    }

    func testATaskNeedsTheCoreAndItsOwnPart() throws {
        let bundle = try ModelBundle(folder: root)
        let parts = try bundle.parts(of: "french")
        XCTAssertEqual(parts.map(\.name), ["core", "french"])
        XCTAssertEqual(parts.map(\.part.download), [.essential, .onDemand])
        XCTAssertEqual(parts.map(\.part.assetPack), ["app-core", "app-french"])
        XCTAssertEqual(bundle.metadata.contextLength, 256)
        XCTAssertNil(bundle.metadata.baseModel.license)
        XCTAssertThrowsError(try bundle.parts(of: "german")) { error in
            XCTAssertEqual(error.localizedDescription, "There is no task german; there are french.")
        }
    }

    func testAnInstructionFindsItsTaskAndAnotherFindsNone() throws {
        let bundle = try ModelBundle(folder: root)
        XCTAssertEqual(bundle.task(for: " You translate\ninto French. "), "french")
        XCTAssertEqual(bundle.task(for: "french"), "french")
        XCTAssertNil(bundle.task(for: "You translate into German."))
    }

    func testWhatIsNotThereOrTooShortIsToBeFetched() throws {
        let bundle = try ModelBundle(folder: root)
        XCTAssertTrue(try bundle.missing(for: "french").isEmpty)
        try write("sal", to: "tasks/french/model-french.safetensors")
        XCTAssertEqual(try bundle.missing(for: "french").map(\.assetPack), ["app-french"])
        XCTAssertThrowsError(try bundle.assemble("french", in: root)) { error in
            XCTAssertEqual(
                error.localizedDescription, "The asset pack app-french is not here; fetch it first.")
        }
    }

    func testAChangedFileIsFoundByItsDigest() throws {
        let bundle = try ModelBundle(folder: root)
        let part = try XCTUnwrap(bundle.metadata.parts["french"])
        XCTAssertEqual(bundle.damaged(part), [])
        try write("salud", to: "tasks/french/model-french.safetensors")
        XCTAssertEqual(bundle.damaged(part), ["tasks/french/model-french.safetensors"])
    }

    func testATaskIsLaidIntoOneFolderAgainAndAgain() throws {
        let bundle = try ModelBundle(folder: root)
        for _ in 0..<2 {
            let made = try bundle.assemble("french", in: root.appendingPathComponent("caches"))
            XCTAssertEqual(made.lastPathComponent, "french-8020e545473e")
            let names = try FileManager.default.contentsOfDirectory(atPath: made.path).sorted()
            XCTAssertEqual(names, ["config.json", "model-french.safetensors"])
            let text = try String(
                contentsOf: made.appendingPathComponent("model-french.safetensors"), encoding: .utf8)
            XCTAssertEqual(text, "salut")
        }
    }

    func testFilesOfAssetPacksMayLieAnywhere() throws {
        let folder = root!
        let bundle = try ModelBundle(json: Data(metadata().utf8)) { path in
            guard path.hasPrefix("core/") else { throw BundleError("not downloaded") }
            return folder.appendingPathComponent(path)
        }
        XCTAssertEqual(try bundle.missing(for: "french").map(\.assetPack), ["app-french"])
    }

    func testMetadataThatCannotBeReliedOnIsRefused() {
        let mistakes = [
            "tasks/french/model": "tasks/french/../../model",
            "ifp_mlx.bundle.1": "ifp_mlx.bundle.2",
            "[\"core\", \"french\"]": "[\"core\", \"lost\"]",
        ]
        for (right, wrong) in mistakes {
            let text = metadata().replacingOccurrences(of: right, with: wrong)
            XCTAssertNotEqual(text, metadata())
            XCTAssertThrowsError(try Metadata(json: Data(text.utf8))) { error in
                XCTAssertTrue(error is BundleError, "\(error)")
            }
        }
    }

    private func write(_ text: String, to path: String) throws {
        let file = root.appendingPathComponent(path)
        try FileManager.default.createDirectory(
            at: file.deletingLastPathComponent(), withIntermediateDirectories: true)
        try Data(text.utf8).write(to: file)
    }

    private func digest(_ text: String) -> String {
        var hash = SHA256()
        hash.update(Data(text.utf8))
        return hash.finish()
    }

    private func metadata() -> String {
        """
        {"$schema": "metadata.schema.json", "format": "ifp_mlx.bundle.1", "name": "app",
         "version": "1.0", "kind": "mlx", "minimum_os": {"iOS": "17.0", "macOS": "14.0"},
         "bytes": 11, "context_length": 256, "quantisation": null, "made_by": {},
         "base_model": {"name": "tiny", "source": null, "license": null, "license_files": []},
         "tasks": {"french": {"instruction": "You translate into French.",
           "mask_id": "8020e545473e", "identity": "8020e545473e", "unit": "channel",
           "keep": 0.25, "agreement": null, "kl": null, "function": null,
           "parts": ["core", "french"]}},
         "parts": {
           "core": {"download": "essential", "asset_pack": "app-core", "folder": "core",
             "bytes": 6, "files": {"core/config.json":
               {"bytes": 6, "sha256": "\(digest("shared"))"}}},
           "french": {"download": "onDemand", "asset_pack": "app-french",
             "folder": "tasks/french", "bytes": 5, "files":
               {"tasks/french/model-french.safetensors":
                 {"bytes": 5, "sha256": "\(digest("salut"))"}}}}}
        """
    }
}
