// compact-chat FOLDER: chat with a compact folder through mlx-swift-lm, nothing of ours.
// Not compiled and not run: written on Linux. See README.md.
import Foundation
import MLXHuggingFace
import MLXLLM
import MLXLMCommon
import Tokenizers

let folder = URL(fileURLWithPath: CommandLine.arguments[1], isDirectory: true)
let model = try await LLMModelFactory.shared.loadContainer(
    from: folder, using: #huggingFaceTokenizerLoader())
let parameters = GenerateParameters(maxTokens: 512, temperature: 0)
let session = ChatSession(model, generateParameters: parameters)

while true {
    print("> ", terminator: "")
    fflush(stdout)
    guard let line = readLine(), !line.isEmpty else { break }
    for try await text in session.streamResponse(to: line) {
        print(text, terminator: "")
        fflush(stdout)
    }
    print()
}
