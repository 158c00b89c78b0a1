// globe_csrc::batched_spd_solve for torch; globe_kernels/ops/batched_spd_solve.py has the formula.
#include "batched_spd_solve.cuh"

#include <ATen/Functions.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

namespace {

using namespace globe::spd;

template <typename T>
void run(const at::Tensor &gram, const at::Tensor &rhs, const at::Tensor &solution, const at::Tensor &info) {
    const auto *values = gram.const_data_ptr<T>();
    const Systems<T> systems{
        .gram = values,
        .rhs = rhs.const_data_ptr<T>(),
        .solution = solution.mutable_data_ptr<T>(),
        .info = info.mutable_data_ptr<int32_t>(),
        .count = gram.size(0),
        .q = rhs.size(2),
        .k = static_cast<int>(gram.size(1)),
        .aligned = gram.size(1) % V<T> == 0 && reinterpret_cast<uintptr_t>(values) % sizeof(Chunk<T>) == 0,
    };
    C10_CUDA_CHECK(launch(systems, c10::cuda::getCurrentCUDAStream()));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
}

int shared_bytes(const at::Tensor &gram) {
    const int k = gram.size(1);
    return with_width(k, [&](auto width) {
        using Shape = Block<decltype(width)::value>;
        return gram.scalar_type() == at::kFloat ? Shape::template shared_bytes<float>(k)
                                                : Shape::template shared_bytes<double>(k);
    });
}

std::tuple<at::Tensor, at::Tensor> solve(const at::Tensor &gram, const at::Tensor &rhs) {
    TORCH_CHECK_VALUE(gram.is_cuda() && gram.device() == rhs.device(), "gram and rhs must be on one CUDA device.");
    TORCH_CHECK_VALUE(gram.is_contiguous() && rhs.is_contiguous(), "gram and rhs must be contiguous.");
    TORCH_CHECK_VALUE(gram.scalar_type() == rhs.scalar_type() &&
                          (gram.scalar_type() == at::kFloat || gram.scalar_type() == at::kDouble),
                      "gram and rhs must both be float32 or both float64.");
    TORCH_CHECK_VALUE(gram.dim() == 3 && rhs.dim() == 3 && gram.size(1) == gram.size(2) &&
                          gram.size(0) == rhs.size(0) && gram.size(1) == rhs.size(1),
                      "gram is ", gram.sizes(), " and rhs ", rhs.sizes(), "; expected (N, k, k) and (N, k, q).");
    TORCH_CHECK_VALUE(0 < gram.size(1) && gram.size(1) <= LARGEST, "k is ", gram.size(1), "; expected 1 to ", LARGEST,
                      ".");
    const c10::cuda::CUDAGuard guard(gram.device());
    int room = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerBlockOptin, gram.get_device()));
    TORCH_CHECK_VALUE(shared_bytes(gram) <= room, "Systems of order ", gram.size(1), " need ", shared_bytes(gram),
                      " bytes of shared memory and this card has ", room, "; use float32 or a smaller k.");
    const at::Tensor solution = at::empty_like(rhs);
    const at::Tensor info = at::empty({gram.size(0)}, gram.options().dtype(at::kInt));
    if (gram.size(0) > 0) {
        const auto run_it = gram.scalar_type() == at::kFloat ? run<float> : run<double>;
        run_it(gram, rhs, solution, info);
    }
    return {solution, info};
}

} // namespace

TORCH_LIBRARY_FRAGMENT(globe_csrc, library) {
    library.def("batched_spd_solve(Tensor gram, Tensor rhs) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(globe_csrc, CUDA, library) { library.impl("batched_spd_solve", solve); }
