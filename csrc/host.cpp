// The lines of batched_spd_solve.cuh on a CPU, a thread for every lane and a barrier for every synchronisation:
//
//     host shared                            a line per kernel of its largest system: type, width, bytes of a block
//     host f32|f64 COUNT K Q INPUT OUTPUT    INPUT: gram, rhs; OUTPUT: solution, info (int32)
//
// Built with -fsanitize=thread it finds the synchronisation that is missing.
#include "batched_spd_solve.cuh"

#include <barrier>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string_view>
#include <thread>
#include <vector>

using namespace globe::spd;

template <int WIDTH_> struct Threads {
    static constexpr int WIDTH = WIDTH_;
    int number;
    std::barrier<> *all;

    int rank() const { return number; }
    void sync() const { all->arrive_and_wait(); }
};

template <typename T, int WIDTH> void run(const Systems<T> &systems) {
    std::vector<Chunk<T>> memory(shared_values<T>(systems.k) / V<T>);
    std::barrier<> all(WIDTH);
    std::vector<std::jthread> threads;
    for (int lane = 0; lane < WIDTH; ++lane)
        threads.emplace_back([&, lane] {
            for (int64_t number = 0; number < systems.count; ++number)
                solve_one(Threads<WIDTH>{lane, &all}, systems, number, memory[0].at);
        });
}

template <typename T> void solve(char **arguments) {
    Systems<T> systems{};
    systems.count = std::atoll(arguments[0]);
    systems.k = std::atoi(arguments[1]);
    systems.q = std::atoll(arguments[2]);
    systems.aligned = systems.k % V<T> == 0;
    const int64_t rows = systems.count * systems.k;
    std::vector<Chunk<T>> gram(rows * systems.k / V<T> + 1); // for its alignment
    std::vector<T> rhs(rows * systems.q), solution(rhs.size());
    std::vector<int32_t> info(systems.count);
    std::ifstream input(arguments[3], std::ios::binary);
    input.read(reinterpret_cast<char *>(gram.data()), rows * systems.k * sizeof(T));
    input.read(reinterpret_cast<char *>(rhs.data()), rhs.size() * sizeof(T));
    systems.gram = gram[0].at;
    systems.rhs = rhs.data();
    systems.solution = solution.data();
    systems.info = info.data();
    with_width(systems.k, [&](auto width) { run<T, decltype(width)::value>(systems); });
    std::ofstream output(arguments[4], std::ios::binary);
    output.write(reinterpret_cast<const char *>(solution.data()), solution.size() * sizeof(T));
    output.write(reinterpret_cast<const char *>(info.data()), info.size() * sizeof(int32_t));
}

template <typename T> void print_shared(const char *type) {
    for (const int width : {16, 32, 64, LARGEST})
        with_width(width, [&](auto lanes) {
            using Shape = Block<decltype(lanes)::value>;
            std::printf("%s %d %d\n", type, width, Shape::template shared_bytes<T>(width));
        });
}

int main(int count, char **arguments) {
    const std::string_view mode = count > 1 ? arguments[1] : "";
    if (mode == "shared" && count == 2) {
        print_shared<float>("float");
        print_shared<double>("double");
    } else if (mode == "f32" && count == 7) {
        solve<float>(arguments + 2);
    } else if (mode == "f64" && count == 7) {
        solve<double>(arguments + 2);
    } else {
        return 2;
    }
}
