import Foundation

/// SHA-256 (FIPS 180-4), so that a bundle can be checked wherever Swift runs.
public struct SHA256 {
    private static let constants: [UInt32] = primes(64).map { fraction(cbrt(Double($0))) }

    private var state: [UInt32] = primes(8).map { fraction(Double($0).squareRoot()) }
    private var waiting: [UInt8] = []
    private var count: UInt64 = 0
    private var words = [UInt32](repeating: 0, count: 64)

    public init() {}

    /// Reads more bytes.
    public mutating func update(_ data: some DataProtocol) {
        count += UInt64(data.count)
        waiting.append(contentsOf: data)
        let whole = waiting.count / 64 * 64
        for start in stride(from: 0, to: whole, by: 64) { compress(at: start) }
        waiting.removeFirst(whole)
    }

    /// Ends the reading and returns 64 hex digits.
    public mutating func finish() -> String {
        let bits = count * 8
        waiting.append(0x80)
        while waiting.count % 64 != 56 { waiting.append(0) }
        for shift in stride(from: 56, through: 0, by: -8) {
            waiting.append(UInt8(truncatingIfNeeded: bits >> UInt64(shift)))
        }
        for start in stride(from: 0, to: waiting.count, by: 64) { compress(at: start) }
        return state.map { word in
            let digits = String(word, radix: 16)
            return String(repeating: "0", count: 8 - digits.count) + digits
        }.joined()
    }

    /// Returns the digest of a file, read a megabyte at a time.
    public static func of(file: URL) throws -> String {
        let handle = try FileHandle(forReadingFrom: file)
        defer { try? handle.close() }
        var hash = SHA256()
        while let piece = try handle.read(upToCount: 1 << 20), !piece.isEmpty {
            hash.update(piece)
        }
        return hash.finish()
    }

    private mutating func compress(at start: Int) {
        waiting.withUnsafeBufferPointer { bytes in
            for t in 0..<16 {
                let at = start + 4 * t
                words[t] =
                    UInt32(bytes[at]) << 24 | UInt32(bytes[at + 1]) << 16
                    | UInt32(bytes[at + 2]) << 8 | UInt32(bytes[at + 3])
            }
        }
        for t in 16..<64 {
            let (w2, w15) = (words[t - 2], words[t - 15])
            let near = Self.turn(w2, 17) ^ Self.turn(w2, 19) ^ (w2 >> 10)
            let far = Self.turn(w15, 7) ^ Self.turn(w15, 18) ^ (w15 >> 3)
            words[t] = near &+ words[t - 7] &+ far &+ words[t - 16]
        }
        mix()
    }

    private mutating func mix() {
        var (a, b, c, d) = (state[0], state[1], state[2], state[3])
        var (e, f, g, h) = (state[4], state[5], state[6], state[7])
        let constants = Self.constants
        for t in 0..<64 {
            let upper = Self.turn(e, 6) ^ Self.turn(e, 11) ^ Self.turn(e, 25)
            let choice = (e & f) ^ (~e & g)
            let first = h &+ upper &+ choice &+ constants[t] &+ words[t]
            let lower = Self.turn(a, 2) ^ Self.turn(a, 13) ^ Self.turn(a, 22)
            let majority = (a & b) ^ (a & c) ^ (b & c)
            (h, g, f, e) = (g, f, e, d &+ first)
            (d, c, b, a) = (c, b, a, first &+ lower &+ majority)
        }
        for (i, word) in [a, b, c, d, e, f, g, h].enumerated() { state[i] = state[i] &+ word }
    }

    private static func turn(_ word: UInt32, _ by: UInt32) -> UInt32 {
        word >> by | word << (32 - by)
    }

    /// The first 32 bits of a number's fraction: what the standard's constants are.
    private static func fraction(_ number: Double) -> UInt32 {
        UInt32((number - number.rounded(.down)) * 4_294_967_296)
    }

    private static func primes(_ count: Int) -> [Int] {
        var found: [Int] = []
        var candidate = 2
        while found.count < count {
            if found.allSatisfy({ candidate % $0 != 0 }) { found.append(candidate) }
            candidate += 1
        }
        return found
    }
}
