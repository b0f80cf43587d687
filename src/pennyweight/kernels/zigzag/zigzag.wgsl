// The zigzag product in WGSL. reference.py says what, __init__.py how, docs/formats.md where the bytes are.
// No optional feature of WebGPU is used: float16 comes through unpack2x16float, order through integers.

struct Shape {
    rows: u32,
    columns: u32,
    tile_rows: u32,
    group: u32,
    scales: u32,  // 0 symmetric, 1 affine, 2 super
    chunk_words: u32,
    padded_rows: u32,
    slices: u32,
    first_tile: u32,  // that the bound weights begin with
}

struct Channel {
    index: u32,
    value: f32,
}

@group(0) @binding(0) var<uniform> shape: Shape;
@group(0) @binding(1) var<uniform> threshold: i32;  // bits of a float; -1 if it is negative
@group(0) @binding(2) var<storage, read> x: array<f32>;
@group(0) @binding(3) var<storage, read> importance: array<f32>;
@group(0) @binding(4) var<storage, read_write> counts: array<u32>;  // kept in each block of x; last, in all of it
@group(0) @binding(5) var<storage, read_write> kept: array<Channel>;
@group(0) @binding(6) var<storage, read> packed: array<u32>;
@group(0) @binding(7) var<storage, read_write> partial: array<vec4f>;  // (slices, padded_rows / 4)
@group(0) @binding(8) var<storage, read_write> y: array<f32>;

const BLOCK = 256u;
const BAND_WORDS = 64u;  // of 8 rows: 256 bytes of every column
const INFINITY = 0x7f800000;

var<workgroup> before: atomic<u32>;
var<workgroup> ranks: array<u32, BLOCK>;

// WGSL promises that workgroup memory begins as zeros; with Mesa 22.3's lavapipe it did not.
fn clear_before(lane: u32) {
    if (lane == 0u) {
        atomicStore(&before, 0u);
    }
    workgroupBarrier();
}

// Floats that are not negative are ordered as their bits are. Compared as floats, infinity and NaN would be lost:
// WGSL lets a compiler assume that there are none.
fn keeps(column: u32) -> bool {
    if (column >= shape.columns) {
        return false;
    }
    let size = bitcast<i32>(abs(x[column]) * importance[column]);
    return size > threshold && size <= INFINITY;
}

@compute @workgroup_size(BLOCK)
fn count(
    @builtin(global_invocation_id) at: vec3u,
    @builtin(local_invocation_index) lane: u32,
    @builtin(workgroup_id) block: vec3u,
) {
    clear_before(lane);
    if (keeps(at.x)) {
        atomicAdd(&before, 1u);
    }
    workgroupBarrier();
    if (lane == 0u) {
        counts[block.x] = atomicLoad(&before);
    }
}

@compute @workgroup_size(BLOCK)
fn scatter(
    @builtin(global_invocation_id) at: vec3u,
    @builtin(local_invocation_index) lane: u32,
    @builtin(workgroup_id) block: vec3u,
    @builtin(num_workgroups) blocks: vec3u,
) {
    clear_before(lane);
    for (var i = lane; i < block.x; i += BLOCK) {
        atomicAdd(&before, counts[i]);
    }
    let keep = keeps(at.x);
    ranks[lane] = u32(keep);
    for (var step = 1u; step < BLOCK; step *= 2u) {
        workgroupBarrier();
        var left = 0u;
        if (lane >= step) {
            left = ranks[lane - step];
        }
        workgroupBarrier();
        ranks[lane] += left;
    }
    workgroupBarrier();
    let end = atomicLoad(&before) + ranks[lane];
    if (keep) {
        kept[end - 1u] = Channel(at.x, x[at.x]);
    }
    if (lane == BLOCK - 1u && block.x == blocks.x - 1u) {
        counts[blocks.x] = end;
    }
}

// The i-th float16 of a chunk.
fn half_at(chunk: u32, i: u32) -> f32 {
    return unpack2x16float(packed[chunk + i / 2u] >> (i % 2u * 16u)).x;
}

// A group's scale or minimum of super scales: of groups 0 to 3 of a block 6 bits of `word`, of 4 to 7 low 4 bits of
// `both` and the 2 bits that are left of `word`.
fn six(word: u32, both: u32, group: u32) -> f32 {
    let shift = group % 4u * 8u;
    if (group % 8u < 4u) {
        return f32(word >> shift & 63u);
    }
    return f32((both >> shift & 15u) | ((word >> (shift + 6u)) & 3u) << 4u);
}

// Four bytes of a chunk, from an even one on: an odd number of scales leaves the nibbles between two words.
fn word_at(chunk: u32, byte: u32) -> u32 {
    let first = packed[chunk + byte / 4u];
    if (byte % 4u == 0u) {
        return first;
    }
    return (first >> 16u) | (packed[chunk + byte / 4u + 1u] << 16u);
}

// A program is a band of rows times a slice of the kept columns; a lane has the 8 rows of one word of nibbles.
@compute @workgroup_size(BAND_WORDS)
fn multiply(@builtin(workgroup_id) program: vec3u, @builtin(local_invocation_index) lane: u32) {
    let words = shape.tile_rows / 8u;
    let bands = (words + BAND_WORDS - 1u) / BAND_WORDS;
    let tile = program.x / bands;
    let word = (program.x % bands) * BAND_WORDS + lane;
    if (word >= words) {
        return;
    }
    let row = (word / 16u) * 128u + (word % 4u) * 32u + (word % 16u / 4u) * 4u;
    let groups = shape.tile_rows / shape.group;
    let group = row / shape.group;
    let byte = select(2u, 4u, shape.scales == 1u) * groups + 4u * word;
    let offset = select(0.0, 8.0, shape.scales == 0u);

    let total = counts[(shape.columns + BLOCK - 1u) / BLOCK];
    let last = total * (program.y + 1u) / shape.slices;
    var low = vec4f();
    var high = vec4f();
    var bias = 0.0;
    for (var i = total * program.y / shape.slices; i < last; i++) {
        let channel = kept[i];
        let chunk = (tile * shape.columns + channel.index) * shape.chunk_words;
        var scale: f32;
        if (shape.scales == 2u) {
            let block = chunk + group / 8u * 4u;
            let factors = unpack2x16float(packed[block]);
            scale = factors.x * six(packed[block + 1u], packed[block + 3u], group);
            bias -= channel.value * factors.y * six(packed[block + 2u], packed[block + 3u] >> 4u, group);
        } else {
            scale = half_at(chunk, group);
        }
        let folded = channel.value * scale;
        let nibbles = word_at(chunk, byte);
        low += folded * (vec4f((vec4u(nibbles) >> vec4u(0u, 8u, 16u, 24u)) & vec4u(15u)) - offset);
        high += folded * (vec4f((vec4u(nibbles) >> vec4u(4u, 12u, 20u, 28u)) & vec4u(15u)) - offset);
        if (shape.scales == 1u) {
            bias += channel.value * half_at(chunk, groups + group);
        }
    }
    let out = (program.y * shape.padded_rows + (shape.first_tile + tile) * shape.tile_rows + row) / 4u;
    partial[out] = low + bias;
    partial[out + 4u] = high + bias;
}

@compute @workgroup_size(BAND_WORDS)
fn reduce(@builtin(global_invocation_id) at: vec3u) {
    let row = at.x;
    if (row >= shape.rows) {
        return;
    }
    var sum = 0.0;
    for (var slice = 0u; slice < shape.slices; slice++) {
        sum += partial[(slice * shape.padded_rows + row) / 4u][row % 4u];
    }
    y[row] = sum;
}
