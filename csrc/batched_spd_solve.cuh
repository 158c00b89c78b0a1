// Batched solves of small symmetric positive definite systems by Cholesky: gram x = rhs.
//
// WIDTH threads share a system, and thread i has its row i, so k <= WIDTH. The factor is computed in place in shared memory,
// left-looking, V columns (16 bytes of a row) at a time. Orders that V does not divide are padded with the identity. The
// code down to the kernel is free of CUDA: host.cpp runs the same lines with a thread of the CPU for every lane.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#define GLOBE_DEVICE __device__ __forceinline__
#define GLOBE_BOTH __host__ __device__
#else
#define GLOBE_DEVICE inline
#define GLOBE_BOTH
#endif

namespace globe::spd {

constexpr int LARGEST = 128; // order of a system
constexpr int COLUMNS = 4;   // of the right-hand side at a time

template <typename T> constexpr int V = 16 / sizeof(T);

template <typename T> struct alignas(16) Chunk {
    T at[V<T>];
};

template <typename T> struct Systems {
    const T *gram; // (count, k, k), of which the lower triangles are read
    const T *rhs;  // (count, k, q)
    T *solution;   // (count, k, q); left as it was for a system that failed
    int32_t *info; // (count); 1 for a system that failed, else 0
    int64_t count, q;
    int k;
    bool aligned; // every row of gram starts on 16 bytes
};

template <typename T> GLOBE_BOTH constexpr int padded(int k) { return (k + V<T> - 1) / V<T> * V<T>; }

// An odd number of chunks: eight lanes that read the same chunk of eight rows meet no bank twice.
template <typename T> GLOBE_BOTH constexpr int stride(int k) { return V<T> * (padded<T>(k) / V<T> | 1); }

// Values of shared memory that a system takes: the matrix, and two buffers in which the lanes publish V rows.
template <typename T> GLOBE_BOTH constexpr int shared_values(int k) {
    return padded<T>(k) * stride<T>(k) + 2 * V<T> * COLUMNS;
}

// The launch for WIDTH lanes per system.
template <int WIDTH> struct Block {
    static constexpr int THREADS = WIDTH <= 32 ? 128 : WIDTH;
    static constexpr int SYSTEMS = THREADS / WIDTH; // at a time

    template <typename T> static constexpr int shared_bytes(int k) { return SYSTEMS * shared_values<T>(k) * sizeof(T); }
};

// Calls `launch` with the fewest lanes that give each of k rows a lane: a part of a warp, a warp or a block.
template <typename Launch> auto with_width(int k, Launch launch) {
    if (k <= 16)
        return launch(std::integral_constant<int, 16>{});
    if (k <= 32)
        return launch(std::integral_constant<int, 32>{});
    if (k <= 64)
        return launch(std::integral_constant<int, 64>{});
    return launch(std::integral_constant<int, LARGEST>{});
}

// Shared memory that a card must have for a system: 99 KB is sm_86, sm_89 and sm_120, 163 KB sm_80.
static_assert(Block<LARGEST>::shared_bytes<float>(LARGEST) <= 99 * 1024);
static_assert(Block<LARGEST>::shared_bytes<double>(110) <= 99 * 1024);
static_assert(Block<LARGEST>::shared_bytes<double>(LARGEST) <= 163 * 1024);

template <typename T> GLOBE_DEVICE Chunk<T> &chunk(T *values) { return *reinterpret_cast<Chunk<T> *>(values); }

template <typename T, typename Group>
GLOBE_DEVICE void load(const Group &group, const T *gram, const Systems<T> &systems, T *matrix) {
    const int k = systems.k, order = padded<T>(k), per_row = order / V<T>;
    for (int number = group.rank(); number < order * per_row; number += Group::WIDTH) {
        const int row = number / per_row, first = number % per_row * V<T>;
        if (first > row)
            continue;
        const T *source = gram + row * k + first;
        Chunk<T> values;
        if (systems.aligned)
            values = *reinterpret_cast<const Chunk<T> *>(source);
        else
            for (int v = 0; v < V<T>; ++v)
                values.at[v] = row < k && first + v < k ? source[v] : T(0);
        chunk(matrix + row * stride<T>(k) + first) = values;
    }
}

// Replaces the lower triangle by the lower triangle of L, with the inverse of the diagonal. Returns false, in every
// thread, when a pivot is not positive.
template <typename T, typename Group> GLOBE_DEVICE bool factorise(const Group &group, T *matrix, T *panel, int k) {
    const int order = padded<T>(k), pitch = stride<T>(k), row = group.rank();
    for (int j = 0; j < order; j += V<T>) {
        const bool below = row >= j && row < order;
        Chunk<T> sums{};
        if (below) {
            sums = chunk(matrix + row * pitch + j);
#pragma unroll
            for (int v = 0; v < V<T>; ++v)
                if (row == j + v && row >= k)
                    sums.at[v] += 1;
            for (int c = 0; c < j; c += V<T>) {
                const Chunk<T> left = chunk(matrix + row * pitch + c);
#pragma unroll
                for (int v = 0; v < V<T>; ++v) {
                    const Chunk<T> other = chunk(matrix + (j + v) * pitch + c);
#pragma unroll
                    for (int w = 0; w < V<T>; ++w)
                        sums.at[v] -= left.at[w] * other.at[w];
                }
            }
        }
#pragma unroll
        for (int v = 0; v < V<T>; ++v) {
            if (row >= j + v && row < j + V<T>)
                panel[v * V<T> + row - j] = sums.at[v];
            group.sync();
            const T pivot = panel[v * V<T> + v];
            if (!(pivot > 0)) // a NaN too
                return false;
            const T inverse = 1 / std::sqrt(pivot);
            const T value = sums.at[v] * inverse;
            sums.at[v] = row == j + v ? inverse : value;
#pragma unroll
            for (int w = v + 1; w < V<T>; ++w)
                sums.at[w] -= value * (panel[v * V<T> + w] * inverse);
        }
        if (below)
            chunk(matrix + row * pitch + j) = sums;
        group.sync();
    }
    return true;
}

// A step of L y = b, or of L^T x = y, on the rows from j on. Every thread computes the unknowns of these rows; each row
// that is left subtracts them from `sides`, its values of the right-hand side. Synchronises once, so buffers of
// consecutive steps differ.
template <bool FORWARD, typename T, typename Group>
GLOBE_DEVICE void substitute(const Group &group, T *matrix, T *buffer, int pitch, int order, int j, T (&sides)[COLUMNS]) {
    const int row = group.rank();
    const bool inside = row >= j && row < j + V<T>;
    if (inside)
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c)
            buffer[(row - j) * COLUMNS + c] = sides[c];
    group.sync();
    T x[V<T>][COLUMNS];
#pragma unroll
    for (int step = 0; step < V<T>; ++step) {
        const int v = FORWARD ? step : V<T> - 1 - step;
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c)
            x[v][c] = buffer[v * COLUMNS + c];
#pragma unroll
        for (int known = 0; known < step; ++known) {
            const int w = FORWARD ? known : V<T> - 1 - known;
            const T factor = FORWARD ? matrix[(j + v) * pitch + j + w] : matrix[(j + w) * pitch + j + v];
#pragma unroll
            for (int c = 0; c < COLUMNS; ++c)
                x[v][c] -= factor * x[w][c];
        }
        const T inverse = matrix[(j + v) * pitch + j + v];
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c)
            x[v][c] *= inverse;
    }
    const bool left = FORWARD ? row >= j + V<T> && row < order : row < j;
    Chunk<T> factors{};
    if (left && FORWARD)
        factors = chunk(matrix + row * pitch + j);
#pragma unroll
    for (int v = 0; v < V<T>; ++v) {
        if (left && !FORWARD)
            factors.at[v] = matrix[(j + v) * pitch + row];
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c)
            sides[c] = row == j + v ? x[v][c] : sides[c] - factors.at[v] * x[v][c];
    }
}

// Solves system `number` by all threads of a group.
template <typename T, typename Group>
GLOBE_DEVICE void solve_one(const Group &group, const Systems<T> &systems, int64_t number, T *matrix) {
    const int k = systems.k, order = padded<T>(k), pitch = stride<T>(k), row = group.rank();
    const int64_t q = systems.q;
    T *buffer = matrix + order * pitch;
    load(group, systems.gram + number * k * k, systems, matrix);
    group.sync();
    const bool solvable = factorise(group, matrix, buffer, k);
    if (row == 0)
        systems.info[number] = solvable ? 0 : 1;
    const T *rhs = systems.rhs + (number * k + row) * q;
    T *solution = systems.solution + (number * k + row) * q;
    for (int64_t first = 0; solvable && first < q; first += COLUMNS) {
        T sides[COLUMNS];
        for (int c = 0; c < COLUMNS; ++c)
            sides[c] = row < k && first + c < q ? rhs[first + c] : T(0);
        int step = 0;
        for (int j = 0; j < order; j += V<T>)
            substitute<true>(group, matrix, buffer + (step++ & 1) * V<T> * COLUMNS, pitch, order, j, sides);
        for (int j = order - V<T>; j >= 0; j -= V<T>)
            substitute<false>(group, matrix, buffer + (step++ & 1) * V<T> * COLUMNS, pitch, order, j, sides);
        for (int c = 0; c < COLUMNS; ++c)
            if (row < k && first + c < q)
                solution[first + c] = sides[c];
    }
    group.sync(); // the next system overwrites the matrix
}

#ifdef __CUDACC__

// WIDTH consecutive threads of a block.
template <int WIDTH_> struct Lanes {
    static constexpr int WIDTH = WIDTH_;

    __device__ int rank() const { return threadIdx.x % WIDTH; }
    __device__ void sync() const {
        if constexpr (WIDTH == 16)
            __syncwarp(0xffffu << (threadIdx.x & 16));
        else if constexpr (WIDTH == 32)
            __syncwarp();
        else
            __syncthreads();
    }
};

// Any grid; dynamic shared memory of Block<WIDTH>::shared_bytes. Bound to five warps per scheduler, because the compiler
// would spill to fit more.
template <typename T, int WIDTH>
__global__ void __launch_bounds__(Block<WIDTH>::THREADS, 640 / Block<WIDTH>::THREADS)
    batched_spd_solve(const Systems<T> systems) {
    extern __shared__ float4 memory[];
    constexpr int SYSTEMS = Block<WIDTH>::SYSTEMS;
    const int part = threadIdx.x / WIDTH;
    T *matrix = reinterpret_cast<T *>(memory) + part * shared_values<T>(systems.k);
    for (int64_t number = int64_t(blockIdx.x) * SYSTEMS + part; number < systems.count;
         number += int64_t(gridDim.x) * SYSTEMS)
        solve_one(Lanes<WIDTH>{}, systems, number, matrix);
}

// count > 0 and 0 < k <= LARGEST.
template <typename T> cudaError_t launch(const Systems<T> &systems, cudaStream_t stream) {
    return with_width(systems.k, [&](auto width) {
        using Shape = Block<decltype(width)::value>;
        constexpr int64_t MOST_BLOCKS = 65536; // more than any card holds at a time
        const auto kernel = batched_spd_solve<T, decltype(width)::value>;
        const int64_t blocks = (systems.count + Shape::SYSTEMS - 1) / Shape::SYSTEMS;
        const int bytes = Shape::template shared_bytes<T>(systems.k);
        const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
        if (error != cudaSuccess)
            return error;
        kernel<<<unsigned(blocks < MOST_BLOCKS ? blocks : MOST_BLOCKS), Shape::THREADS, bytes, stream>>>(systems);
        return cudaGetLastError();
    });
}

#endif

} // namespace globe::spd
