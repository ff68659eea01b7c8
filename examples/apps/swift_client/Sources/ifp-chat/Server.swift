// The part to copy into an app: a streaming client of ifp_mlx.server, with Foundation only.
// Not compiled and not run: written on Linux. See README.md.
import Foundation

struct Message: Codable, Sendable {
    let role: String
    let content: String
}

/// What selects the channels. Without it the system message and the first user message do.
struct Selection: Encodable, Sendable {
    var instruction: String?
    var keep: Double?  // share of the channels, 0 to 1
}

/// Which channels answered, and how fast: in the last chunk of every answer.
struct Report: Decodable, Sendable {
    let maskId: String
    let keptChannels: Int
    let totalChannels: Int
    let tokensPerSecond: Double
}

enum Event: Sendable {
    case text(String)
    case report(Report)
}

struct ServerError: LocalizedError {
    let message: String
    var errorDescription: String? { message }
}

struct Server: Sendable {
    var url = URL(string: "http://127.0.0.1:8080/v1")!
    var key: String?  // of --api-key

    /// Streams an answer; leaving the loop, or cancelling its task, stops the server's work.
    func chat(
        _ messages: [Message], model: String, selection: Selection? = nil, maxTokens: Int = 512
    ) -> AsyncThrowingStream<Event, Error> {
        AsyncThrowingStream { continuation in
            let task = Task {
                do {
                    let body = Body(
                        model: model, messages: messages, maxTokens: maxTokens, ifp: selection)
                    let request = try self.request(body)
                    let (bytes, response) = try await URLSession.shared.bytes(for: request)
                    if (response as? HTTPURLResponse)?.statusCode != 200 {
                        var answer = Data()
                        for try await byte in bytes { answer.append(byte) }
                        let chunk = try? decoder().decode(Chunk.self, from: answer)
                        throw ServerError(
                            message: chunk?.error?.message ?? String(decoding: answer, as: UTF8.self))
                    }
                    for try await line in bytes.lines {
                        guard line.hasPrefix("data: ") else { continue }  // a progress comment
                        let data = line.dropFirst(6)
                        if data == "[DONE]" { break }
                        let chunk = try decoder().decode(Chunk.self, from: Data(data.utf8))
                        if let error = chunk.error { throw ServerError(message: error.message) }
                        if let text = chunk.choices?.first?.delta.content, !text.isEmpty {
                            continuation.yield(.text(text))
                        }
                        if let report = chunk.ifp { continuation.yield(.report(report)) }
                    }
                    continuation.finish()
                } catch {
                    continuation.finish(throwing: error)
                }
            }
            continuation.onTermination = { _ in task.cancel() }
        }
    }

    private func request(_ body: Body) throws -> URLRequest {
        var request = URLRequest(url: url.appendingPathComponent("chat/completions"))
        request.httpMethod = "POST"
        request.timeoutInterval = 600  // a long prompt; comments come while it is read
        request.setValue("application/json", forHTTPHeaderField: "Content-Type")
        if let key { request.setValue("Bearer \(key)", forHTTPHeaderField: "Authorization") }
        let encoder = JSONEncoder()
        encoder.keyEncodingStrategy = .convertToSnakeCase
        request.httpBody = try encoder.encode(body)
        return request
    }
}

private func decoder() -> JSONDecoder {
    let decoder = JSONDecoder()
    decoder.keyDecodingStrategy = .convertFromSnakeCase
    return decoder
}

private struct Body: Encodable {
    let model: String
    let messages: [Message]
    let maxTokens: Int
    let ifp: Selection?
    let stream = true
}

private struct Chunk: Decodable {
    struct Choice: Decodable {
        struct Delta: Decodable { let content: String? }
        let delta: Delta
    }
    struct Failure: Decodable { let message: String }
    let choices: [Choice]?
    let ifp: Report?
    let error: Failure?
}
