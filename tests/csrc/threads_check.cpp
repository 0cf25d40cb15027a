// The loops over threads: every index once, exceptions arrive, callers at the same time, forked children.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <thread>
#include <vector>

#include "threads.h"

using factorkit::parallel_for;
using factorkit::parallel_for_uneven;
using std::int64_t;

void expect(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "%s\n", what);
    std::exit(1);
}

// Whether all of [0, count) were visited once, through memory that is not atomic.
bool visits_all(int64_t count, int threads, int64_t block) {
    std::vector<int> visits(count);
    const auto visit = [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) ++visits[i];
    };
    if (block)
        parallel_for_uneven(count, block, threads, visit);
    else
        parallel_for(count, threads, visit);
    for (int visit : visits)
        if (visit != 1) return false;
    return true;
}

void all_ways() {
    for (int round = 0; round < 50; ++round)
        for (int threads : {0, 1, 2, 3, 8})
            for (int64_t count : {0, 1, 2, 7, 1000})
                for (int64_t block : {0, 1, 64})
                    expect(visits_all(count, threads, block), "an index was not visited once");
}

void forked() {
    const pid_t child = fork();
    if (child == 0) {
        all_ways();
        std::_Exit(0);
    }
    int status = 1;
    waitpid(child, &status, 0);
    expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a forked child did not finish");
}

int main(int count, char**) {
    all_ways();
    for (int64_t bad : {0, 3}) {
        bool arrived = false;
        try {
            parallel_for(4, 4, [&](int64_t begin, int64_t) {
                if (begin == bad) throw std::runtime_error("as planned");
            });
        } catch (const std::runtime_error&) {
            arrived = true;
        }
        expect(arrived, "an exception was lost");
        expect(visits_all(1000, 4, 0), "work after an exception");
    }
    std::vector<std::thread> callers;
    for (int i = 0; i < 3; ++i) callers.emplace_back(all_ways);
    for (std::thread& caller : callers) caller.join();
    if (count == 1) forked();  // ThreadSanitizer does not follow a fork of a program with threads
    std::puts("ok");
}
