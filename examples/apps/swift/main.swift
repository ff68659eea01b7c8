// Decode with an exported package: Core ML's own state, swift-transformers' tokenizer.
// Not compiled and not run on a Mac: written on Linux. macOS 15 or iOS 18. See README.md.
import CoreML
import Tokenizers

let arguments = CommandLine.arguments  // OUT.mlpackage OUT "prompt" [function]
let folder = URL(fileURLWithPath: arguments[2])  // what the export wrote beside it
let configuration = MLModelConfiguration()
configuration.computeUnits = .cpuAndGPU
if arguments.count > 4 { configuration.functionName = arguments[4] }  // which task
let compiled = try await MLModel.compileModel(at: URL(fileURLWithPath: arguments[1]))
let model = try MLModel(contentsOf: compiled, configuration: configuration)
let tokenizer = try await AutoTokenizer.from(modelFolder: folder)
let manifest = try JSONSerialization.jsonObject(
    with: Data(contentsOf: folder.appendingPathComponent("manifest.json"))) as! [String: Any]
let surplus = manifest["consumer"] as? String == "hf" ? 1 : 0
let piece = manifest["query_length"] as! Int, context = manifest["context_length"] as! Int

let state = model.makeState()  // the KV cache: one per conversation and function
var past = 0

/// Feeds at most `piece` tokens and returns the likeliest next one.
func feed(_ tokens: ArraySlice<Int>) throws -> Int {
    let ids = MLShapedArray<Int32>(scalars: tokens.map(Int32.init), shape: [1, tokens.count])
    past += tokens.count  // the mask says how far: zeros, as causality is in the graph
    let rows = surplus == 1 ? 1 : tokens.count
    let mask = MLShapedArray<Float16>(repeating: 0, shape: [1, 1, rows, past + surplus])
    let inputs = try MLDictionaryFeatureProvider(dictionary: [
        "inputIds": MLMultiArray(ids), "causalMask": MLMultiArray(mask),
    ])
    let output = try model.prediction(from: inputs, using: state)
    let logits = output.featureValue(for: "logits")!.shapedArrayValue(of: Float16.self)!
    let last = logits[0][tokens.count - 1].scalars  // [1, q, V]: the last position
    return last.indices.max { last[$0] < last[$1] }!
}

let prompt = try tokenizer.applyChatTemplate(messages: [["role": "user", "content": arguments[3]]])
var next = 0
for start in stride(from: 0, to: prompt.count, by: piece) {
    next = try feed(prompt[start..<min(start + piece, prompt.count)])
}
while next != tokenizer.eosTokenId, past < context {  // past the cache there is no room
    print(tokenizer.decode(tokens: [next]), terminator: "")
    next = try feed([next])
}
