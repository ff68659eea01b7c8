// ifp-chat MODEL [INSTRUCTION]: a conversation in the terminal. Not compiled, not run.
import Foundation

let arguments = CommandLine.arguments
guard arguments.count > 1 else {
    print("usage: ifp-chat MODEL[@TASK] [INSTRUCTION]")
    exit(2)
}
let server = Server(key: ProcessInfo.processInfo.environment["IFP_MLX_API_KEY"])
let selection = arguments.count > 2 ? Selection(instruction: arguments[2]) : nil
var messages: [Message] = []

while true {
    print("> ", terminator: "")
    fflush(stdout)
    guard let line = readLine(), !line.isEmpty else { break }
    messages.append(Message(role: "user", content: line))
    var answer = ""
    do {
        for try await event in server.chat(messages, model: arguments[1], selection: selection) {
            switch event {
            case .text(let text):
                answer += text
                print(text, terminator: "")
                fflush(stdout)
            case .report(let report):
                let share = 100 * report.keptChannels / report.totalChannels
                let speed = String(format: "%.1f", report.tokensPerSecond)
                print("\n[\(share) % of the channels, mask \(report.maskId), \(speed) tokens/s]")
            }
        }
        messages.append(Message(role: "assistant", content: answer))
    } catch {
        print("\n\(error.localizedDescription)")
        messages.removeLast()
    }
}
