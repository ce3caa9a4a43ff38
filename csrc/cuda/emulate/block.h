// SPDX-License-Identifier: Apache-2.0
// Runs one block of a CUDA kernel on the host, for tests: every thread is a fiber, and what CUDA leaves undefined ends
// the run with a Fault that names the places in the source.
//
// Fibers take turns only where threads of a GPU may wait for each other: at a barrier and at an instruction of a whole
// warp. Which of them goes first does not matter for what is found, because races are not observed but inferred. Two
// accesses of a word by different threads, one of them a write, are ordered only by a barrier of the block between
// them or, within a warp, by a barrier of the warp; so each word of shared memory remembers its last accesses with the
// number of barriers that had passed. For kernels whose threads meet at barriers alone this is exact: it finds a
// missing barrier in any order of execution, and reports none that is not missing.
//
// Found as well: words read before anything was written, accesses outside the block's shared memory or outside the
// tensors of the call, an asynchronous copy used before it was waited for, threads that leave a barrier or a warp's
// instruction to the others, and memory of the GPU that two threads of a launch write, or one writes and one reads.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace gohsp::cuda::emulate {

// What a GPU would have done in silence.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A place in the source. As a default argument it is that of the caller.
struct Place {
  const char* file = "";
  int line = 0;

  static Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  bool operator==(const Place& other) const { return line == other.line && file == other.file; }

  std::string text() const {
    const char* slash = std::strrchr(file, '/');
    return std::string(slash == nullptr ? file : slash + 1) + ":" + std::to_string(line);
  }
};

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kWord = 2;  // bytes that remember their accesses together: the smallest that a kernel stores

// --- memory of the GPU: the tensors of a call, and who wrote what in the running launch ------------------------------
struct Range {
  const char* begin;
  const char* end;
  std::vector<uint32_t> writers;  // of each word, thread of the launch + 1; empty until one writes
  bool written = false;           // by a launch before
};

inline std::vector<Range>& ranges() {
  static thread_local std::vector<Range> all;
  return all;
}

// Lets kernels use these bytes, until forget(), or until something else is to lie there. Called for every tensor that
// an operator hands to a kernel, and for every buffer in its scratch memory.
inline void allow(const void* begin, size_t bytes) {
  const char* first = static_cast<const char*>(begin);
  std::erase_if(ranges(), [&](const Range& r) { return r.begin < first + bytes && first < r.end; });
  ranges().push_back({first, first + bytes, {}});
}

inline void forget() { ranges().clear(); }

// --- shared memory ---------------------------------------------------------------------------------------------------
struct Access {
  int thread = -1;
  uint32_t block_barriers = 0;
  uint32_t warp_barriers = 0;
  uint32_t fences = 0;  // for products, of that thread
  Place place;
};

struct Word {
  Access write, read, other_read;  // of the reads, two by different threads if there are any
  bool pending = false;            // the target of an asynchronous copy that has not been waited for
  int products = 0;                // in flight, that read it
};

struct Copy {
  uint32_t address;
  const char* source;  // nullptr: zeros
  uint32_t bytes;
  Place place;
};

enum class State { ready, at_warp, at_barrier, done };

struct Fiber {
  State state = State::ready;
  Place place;  // where it waits
  jmp_buf context;
  uint32_t warp_barriers = 0;
  bool waited = false;                    // for the launch before
  uint32_t fences = 0;                    // for products
  std::vector<std::vector<Copy>> groups;  // asynchronous copies, oldest group first
  std::vector<Copy> open;                 // those since the last commit
};

struct Warp {
  void* arguments[kWarp];
  int arrived = 0;
  std::vector<uint32_t> read_by_products;  // words, by those in flight
};

class Block {
 public:
  // Runs `body` as every thread of one block. Throws Fault.
  void run(int64_t block, int threads, size_t shared_bytes, bool follows, const std::function<void()>& body) {
    if (threads <= 0 || threads % kWarp != 0) throw Fault("a block has whole warps; got " + std::to_string(threads));
    index = block;
    follows_ = follows;
    body_ = &body;
    memory_.assign(shared_bytes, 0xff);
    words_.assign((shared_bytes + kWord - 1) / kWord, Word{});
    fibers_.assign(threads, Fiber{});
    warps_.assign(threads / kWarp, Warp{});
    block_barriers_ = 1;
    fault_.clear();
    unwritten_.clear();
    while (static_cast<int>(stacks_.size()) < threads) stacks_.emplace_back(new char[kStackBytes]);
    Block* outer = current();
    current() = this;
    schedule();
    current() = outer;
    if (fault_.empty() && follows &&
        !std::all_of(fibers_.begin(), fibers_.end(), [](const Fiber& f) { return f.waited; }))
      fault_ = "a thread that never waited for the launch before";
    if (!fault_.empty()) throw Fault(fault_ + " (block " + std::to_string(block) + ")");
  }

  static Block*& current() {
    static thread_local Block* block = nullptr;
    return block;
  }

  int64_t index = 0;
  int thread() const { return running_; }
  int lane() const { return running_ % kWarp; }

  // --- waiting for each other ---
  void wait_for_launch_before() { fibers_[running_].waited = true; }
  void barrier(Place place) { wait(State::at_barrier, place); }

  // All lanes hand in their arguments; the last one to come runs `all` on them.
  template <class Arguments, class All>
  void collective(Arguments& mine, All all, Place place) {
    Warp& warp = warps_[running_ / kWarp];
    const int first = running_ - lane();
    for (int i = first; i < first + kWarp; ++i)
      if (fibers_[i].state == State::at_warp && !(fibers_[i].place == place))
        fail("lanes of a warp are at different instructions: " + place.text() + " and " + fibers_[i].place.text());
    warp.arguments[lane()] = &mine;
    if (++warp.arrived < kWarp) {
      wait(State::at_warp, place);
      return;
    }
    warp.arrived = 0;
    Arguments* lanes[kWarp];
    for (int i = 0; i < kWarp; ++i) lanes[i] = static_cast<Arguments*>(warp.arguments[i]);
    all(lanes, first);
    for (int i = first; i < first + kWarp; ++i) fibers_[i].state = State::ready;
  }

  void warp_barrier(Place place) {
    int nothing = 0;
    collective(
        nothing,
        [this](int**, int first) {
          for (int i = first; i < first + kWarp; ++i) ++fibers_[i].warp_barriers;
        },
        place);
  }

  // --- shared memory; `thread` is who accesses it ---
  void read(uint32_t address, void* to, size_t bytes, int thread, Place place) {
    check_shared(address, bytes, place);
    for (size_t w = address / kWord; w < (address + bytes) / kWord; ++w) {
      Word& word = words_[w];
      if (word.pending)
        fail("read of an asynchronous copy that was not waited for: copied at " + word.write.place.text() +
             ", read at " + place.text());
      // Not at fault yet: if it is written before the next barrier, the fault is a race, and that names both places.
      if (word.write.thread < 0 && unwritten_.empty())
        unwritten_ =
            "read of shared memory that nobody wrote, at " + place.text() + " by thread " + std::to_string(thread);
      if (unordered(word.write, thread)) race("written", word.write, "read", thread, place);
      if (word.read.thread != thread) word.other_read = word.read;
      word.read = access(thread, place);
    }
    std::memcpy(to, memory_.data() + address, bytes);
  }

  void write(uint32_t address, const void* from, size_t bytes, int thread, Place place) {
    check_shared(address, bytes, place);
    mark_write(address, bytes, thread, place, false);
    std::memcpy(memory_.data() + address, from, bytes);
  }

  // --- asynchronous copies: nothing arrives before it is waited for ---
  void copy_async(uint32_t address, const void* source, uint32_t bytes, bool valid, Place place) {
    check_shared(address, bytes, place);
    if (address % bytes != 0)
      fail("asynchronous copy to an address that is no multiple of its size, at " + place.text());
    if (valid) check_global(source, bytes, bytes, false, place);
    mark_write(address, bytes, running_, place, true);
    fibers_[running_].open.push_back({address, valid ? static_cast<const char*>(source) : nullptr, bytes, place});
  }

  void commit() {
    Fiber& fiber = fibers_[running_];
    fiber.groups.push_back(std::move(fiber.open));
    fiber.open.clear();
  }

  void wait_copies(size_t groups_left) {
    auto& groups = fibers_[running_].groups;
    while (groups.size() > groups_left) {
      for (const Copy& copy : groups.front()) {
        char* to = memory_.data() + copy.address;
        copy.source == nullptr ? std::memset(to, 0, copy.bytes) : std::memcpy(to, copy.source, copy.bytes);
        for (size_t w = copy.address / kWord; w < (copy.address + copy.bytes) / kWord; ++w) {
          words_[w].pending = false;
          words_[w].write = access(running_, copy.place);
        }
      }
      groups.erase(groups.begin());
    }
  }

  // --- products of four warps, which read shared memory until they are waited for ---
  void fence_for_products() { ++fibers_[running_].fences; }

  void read_for_product(uint32_t address, void* to, size_t bytes, int thread, Place place) {
    read(address, to, bytes, thread, place);
    for (size_t w = address / kWord; w < (address + bytes) / kWord; ++w) {
      const Access& write = words_[w].write;
      if (write.thread >= 0 && fibers_[write.thread].fences == write.fences)
        fail("a product reads what was not fenced: written at " + write.place.text() + ", read at " + place.text());
      ++words_[w].products;
      warps_[thread / kWarp].read_by_products.push_back(static_cast<uint32_t>(w));
    }
  }

  void wait_products() {
    Warp& warp = warps_[running_ / kWarp];
    for (const uint32_t w : warp.read_by_products) --words_[w].products;
    warp.read_by_products.clear();
  }

  // --- memory of the GPU ---
  void check_global(const void* pointer, size_t bytes, size_t alignment, bool writes, Place place) {
    if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0)
      fail("misaligned access of a tensor, at " + place.text());
    const char* p = static_cast<const char*>(pointer);
    const uint32_t me = static_cast<uint32_t>(index * static_cast<int64_t>(fibers_.size()) + running_ + 1);
    for (Range& range : ranges()) {
      if (p < range.begin || p + bytes > range.end) continue;
      if (follows_ && !fibers_[running_].waited && (writes || range.written))
        fail("access of memory before waiting for the launch before, at " + place.text());
      if (!writes && range.writers.empty()) return;
      range.writers.resize((range.end - range.begin + kWord - 1) / kWord, 0);
      for (size_t w = (p - range.begin) / kWord; w < (p - range.begin + bytes + kWord - 1) / kWord; ++w) {
        uint32_t& writer = range.writers[w];
        if (writer != 0 && writer != me)
          fail(std::string(writes ? "write" : "read") + " of what another thread of the launch wrote, at " +
               place.text());
        if (writes) writer = me;
      }
      return;
    }
    fail("access outside the tensors of the call, at " + place.text());
  }

  // Ends the run; called by the fiber at fault.
  [[noreturn]] void fail(const std::string& message) const {
    throw Fault(message + " (thread " + std::to_string(running_) + ")");
  }

 private:
  // A switch of stacks without the system calls of swapcontext.
  [[gnu::noinline]] static void jump(jmp_buf& from, jmp_buf& to) {
    if (_setjmp(from) == 0) _longjmp(to, 1);
  }

  void wait(State state, Place place) {
    Fiber& fiber = fibers_[running_];
    fiber.state = state;
    fiber.place = place;
    jump(fiber.context, scheduler_);
  }

  static void enter() {
    Block& block = *current();
    try {
      (*block.body_)();
    } catch (const Fault& fault) {
      block.fault_ = fault.what();
    }
    block.fibers_[block.running_].state = State::done;
    _longjmp(block.scheduler_, 1);
  }

  // Enters a new fiber on a stack of its own.
  void start(int thread) {
    ucontext_t context, unused;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks_[thread].get();
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, enter, 0);
    if (_setjmp(scheduler_) == 0) swapcontext(&unused, &context);
  }

  void schedule() {
    for (running_ = 0; running_ < static_cast<int>(fibers_.size()) && fault_.empty(); ++running_) start(running_);
    while (fault_.empty()) {
      bool moved = false;
      for (running_ = 0; running_ < static_cast<int>(fibers_.size()) && fault_.empty(); ++running_) {
        if (fibers_[running_].state != State::ready) continue;
        moved = true;
        jump(scheduler_, fibers_[running_].context);
      }
      if (!moved && fault_.empty() && !release()) return;
    }
  }

  // Everybody waits or is done. Opens the barrier; false at the end of the block.
  bool release() {
    const auto is = [this](State state) {
      return std::find_if(fibers_.begin(), fibers_.end(), [state](const Fiber& f) { return f.state == state; });
    };
    if (!unwritten_.empty()) {
      fault_ = unwritten_;
      return true;
    }
    const auto waiting = is(State::at_barrier), stuck = is(State::at_warp), left = is(State::done);
    if (stuck != fibers_.end()) {
      fault_ = "an instruction of a whole warp that not all its lanes reach, at " + stuck->place.text();
      return true;
    }
    if (waiting == fibers_.end()) return false;
    if (left != fibers_.end()) {
      fault_ = "divergent barrier: at " + waiting->place.text() + ", while thread " +
               std::to_string(left - fibers_.begin()) + " has left the kernel";
      return true;
    }
    for (Fiber& fiber : fibers_) {
      if (!(fiber.place == waiting->place))
        fault_ = "divergent barrier: at " + waiting->place.text() + " and at " + fiber.place.text();
      fiber.state = State::ready;
    }
    ++block_barriers_;
    return true;
  }

  Access access(int thread, Place place) const {
    return {thread, block_barriers_, fibers_[thread].warp_barriers, fibers_[thread].fences, place};
  }

  bool unordered(const Access& earlier, int thread) const {
    if (earlier.thread < 0 || earlier.thread == thread || earlier.block_barriers != block_barriers_) return false;
    const bool same_warp = earlier.thread / kWarp == thread / kWarp;
    return !(same_warp && earlier.warp_barriers != fibers_[thread].warp_barriers);
  }

  [[noreturn]] void race(const char* did, const Access& earlier, const char* does, int thread, Place place) const {
    fail(std::string("race in shared memory: ") + did + " at " + earlier.place.text() + " by thread " +
         std::to_string(earlier.thread) + ", " + does + " at " + place.text() + " by thread " + std::to_string(thread) +
         ", no barrier between");
  }

  void mark_write(uint32_t address, size_t bytes, int thread, Place place, bool pending) {
    for (size_t w = address / kWord; w < (address + bytes) / kWord; ++w) {
      Word& word = words_[w];
      if (word.pending)
        fail("write over an asynchronous copy that was not waited for: copied at " + word.write.place.text() +
             ", written at " + place.text());
      if (word.products > 0) fail("write over what a product in flight reads, at " + place.text());
      if (unordered(word.write, thread)) race("written", word.write, "written", thread, place);
      for (const Access* read : {&word.read, &word.other_read})
        if (unordered(*read, thread)) race("read", *read, "written", thread, place);
      word.write = access(thread, place);
      word.pending = pending;
    }
  }

  void check_shared(uint32_t address, size_t bytes, Place place) const {
    if (address + bytes > memory_.size() || address % kWord != 0)
      fail("access outside shared memory: bytes " + std::to_string(address) + " to " + std::to_string(address + bytes) +
           " of " + std::to_string(memory_.size()) + ", at " + place.text());
    if (address % std::min<size_t>(bytes, 16) != 0) fail("misaligned access of shared memory, at " + place.text());
  }

  const std::function<void()>* body_ = nullptr;
  std::vector<char> memory_;
  std::vector<Word> words_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::vector<std::unique_ptr<char[]>> stacks_;
  jmp_buf scheduler_;
  int running_ = 0;
  bool follows_ = false;
  uint32_t block_barriers_ = 1;
  std::string fault_;
  std::string unwritten_;  // the first read of a word that nobody wrote, until the next barrier
};

// A launch: one block after another. `follows`: it may begin before the one before it has ended.
inline void launch(int64_t blocks, int threads, size_t shared_bytes, bool follows, const std::function<void()>& body) {
  static thread_local Block block;
  for (Range& range : ranges()) {
    range.written |= !range.writers.empty();
    range.writers.clear();
  }
  for (int64_t i = 0; i < blocks; ++i) block.run(i, threads, shared_bytes, follows, body);
}

}  // namespace gohsp::cuda::emulate
