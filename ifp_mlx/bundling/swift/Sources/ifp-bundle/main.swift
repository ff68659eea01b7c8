// ifp-bundle BUNDLE [TASK FOLDER]: checks every part; lays a task into a folder.
import Foundation
import IFPBundle

let arguments = CommandLine.arguments
guard arguments.count == 2 || arguments.count == 4 else {
    print("usage: ifp-bundle BUNDLE [TASK FOLDER]")
    exit(2)
}
do {
    let bundle = try ModelBundle(folder: URL(fileURLWithPath: arguments[1]))
    var damaged: [String] = []
    for (name, part) in bundle.metadata.parts.sorted(by: { $0.key < $1.key }) {
        let found = bundle.damaged(part)
        damaged += found
        let said = found.isEmpty ? "whole" : "damaged: \(found.joined(separator: ", "))"
        print("\(name): \(part.files.count) files, \(part.bytes) bytes, \(part.download.rawValue), \(said)")
    }
    if damaged.isEmpty, arguments.count == 4 {
        let folder = URL(fileURLWithPath: arguments[3])
        print(try bundle.assemble(arguments[2], in: folder).path)
    }
    exit(damaged.isEmpty ? 0 : 1)
} catch {
    print(error.localizedDescription)
    exit(2)
}
