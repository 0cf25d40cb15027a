#include "threads.h"

#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace factorkit {
namespace {

using std::int64_t;
using Piece = std::function<void(int64_t)>;

// Threads that wait for pieces of work. Whoever calls works along, so pieces never wait for a thread to wake up.
class Crew {
  public:
    // False, and nothing done, while another thread's call is under way.
    bool run(int64_t pieces, const Piece& piece) {
        std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (!turn.owns_lock()) return false;
        std::unique_lock<std::mutex> lock(mutex_);
        for (; hired_ + 1 < pieces; ++hired_) std::thread([this] { work(); }).detach();
        piece_ = &piece, pieces_ = unfinished_ = pieces, next_ = 0, error_ = nullptr;
        for (int64_t i = 1; i < pieces; ++i) wake_.notify_one();
        take(lock);
        done_.wait(lock, [this] { return unfinished_ == 0; });
        if (error_) std::rethrow_exception(error_);
        return true;
    }

  private:
    void work() {
        std::unique_lock<std::mutex> lock(mutex_);
        while (true) {
            wake_.wait(lock, [this] { return next_ < pieces_; });
            take(lock);
        }
    }

    // Pieces until none is left to begin. Holds the lock between pieces.
    void take(std::unique_lock<std::mutex>& lock) {
        while (next_ < pieces_) {
            const int64_t mine = next_++;
            const Piece& piece = *piece_;
            std::exception_ptr error;
            lock.unlock();
            try {
                piece(mine);
            } catch (...) {
                error = std::current_exception();
            }
            lock.lock();
            if (error && !error_) error_ = error;
            if (--unfinished_ == 0) done_.notify_one();
        }
    }

    std::mutex turn_, mutex_;
    std::condition_variable wake_, done_;
    const Piece* piece_ = nullptr;
    int64_t pieces_ = 0, next_ = 0, unfinished_ = 0, hired_ = 0;
    std::exception_ptr error_;
};

// Never destroyed, since its threads wait on it to the end of the program.
Crew*& crew() {
    static Crew* present = new Crew;
    return present;
}

bool is_forked = false;  // whether this process is a child that was forked

#if defined(__unix__) || defined(__APPLE__)
// A child has none of its parent's threads: it gets a crew of its own, and OpenMP would wait for its threads for ever.
// Registered when the module is loaded, as the parent may have used OpenMP and not yet this file.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { crew() = new Crew, is_forked = true; });
#endif

// What runs a function in a number of threads of OpenMP, or null without OpenMP in the program.
using InThreads = void (*)(void (*)(void*), void*, unsigned, unsigned);
InThreads openmp() {
#if defined(__unix__) || defined(__APPLE__)
    static const auto found = reinterpret_cast<InThreads>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return is_forked ? nullptr : found;
#else
    return nullptr;
#endif
}

// In all threads, also where there are fewer pieces: GCC's OpenMP ends threads that a smaller team does without, and
// PyTorch's next operation would start them again.
void run_in_openmp(int64_t pieces, int threads, const Piece& piece) {
    struct Work {
        const Piece& piece;
        const int64_t pieces;
        std::atomic<int64_t> next;
        std::mutex mutex;
        std::exception_ptr error;
    } work{piece, pieces, {0}, {}, {}};
    const auto take = [](void* data) {
        Work& work = *static_cast<Work*>(data);
        for (int64_t mine = work.next++; mine < work.pieces; mine = work.next++) {
            try {
                work.piece(mine);
            } catch (...) {
                const std::lock_guard<std::mutex> lock(work.mutex);
                if (!work.error) work.error = std::current_exception();
            }
        }
    };
    openmp()(take, &work, unsigned(threads), 0);
    if (work.error) std::rethrow_exception(work.error);
}

}  // namespace

void parallel_for(int64_t count, int threads, const std::function<void(int64_t, int64_t)>& body) {
    const int64_t pieces = std::min<int64_t>(count, std::max(1, threads));
    if (pieces <= 1) {
        if (count > 0) body(0, count);
        return;
    }
    const Piece piece = [&](int64_t i) { body(count * i / pieces, count * (i + 1) / pieces); };
    if (openmp()) return run_in_openmp(pieces, threads, piece);
    if (!crew()->run(pieces, piece))
        for (int64_t i = 0; i < pieces; ++i) piece(i);
}

}  // namespace factorkit
