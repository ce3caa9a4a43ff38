// SPDX-License-Identifier: Apache-2.0
// How many workers a call should use on a machine that has other things to do.
//
// Workers that share an image meet after every attention. One that loses its core in the middle of a task holds up the
// others for a time slice each time, and that soon costs more than it brings. So a call that was held up for an eighth
// of its time leaves one worker out of the calls that follow; after a pause that doubles each time, all are tried again.
// Calls that are not held up shorten the next pause by as long as they take. A hiccup costs one slow call, and a core
// that stays busy is tried again once in a second of work.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <limits>

namespace gohsp {

inline int64_t nanoseconds() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// What the others cost one worker in one call. Whoever waits, waits for tasks that others hold, one each and like its
// own last one, so a wait is natural for as long as that took; what exceeds it was somebody's absence.
class LostTime {
 public:
  void begin_task(int64_t now) { begun_ = now; }
  void end_task(int64_t now) { ended_ = now; }

  void wait_until(int64_t now) {
    lost_ = lost_until(now);
    begun_ = ended_ = now;
  }

  int64_t lost_until(int64_t now) const {
    const int64_t excess = (now - ended_) - (ended_ - begun_);
    return lost_ + (excess > 0 ? excess : 0);
  }

 private:
  static constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
  int64_t begun_ = kNever, ended_ = kNever;  // of the last task; without one, nothing is held up
  int64_t lost_ = 0;
};

class WorkerThrottle {
 public:
  static constexpr int64_t kLongestPause = 1000000000;  // nanoseconds of calls

  // How many of so many workers the next call should use.
  int64_t next_size(int64_t workers) const {
    const int64_t missing = left_ > 0 ? missing_ : 0;
    return workers > missing ? workers - missing : 1;
  }

  // Of a call that has ended: how long it took, and how long it was held up. Both in nanoseconds.
  void report(int64_t span, int64_t lost) {
    if (left_ <= 0) missing_ = 0;
    left_ -= span;
    if (8 * lost > span) {
      pause_ = std::min(std::max(2 * pause_, span), kLongestPause);
      left_ = pause_;
      ++missing_;
    } else if (missing_ == 0) {
      pause_ = std::max<int64_t>(pause_ - span, 0);
    }
  }

 private:
  int64_t missing_ = 0;  // workers that are left out
  int64_t left_ = 0;     // until all are tried again; none are missing where it is not positive
  int64_t pause_ = 0;    // what the last absence was worth
};

// That of the calling thread. Chains report to it; whoever makes a Parallel may ask it.
WorkerThrottle& worker_throttle();

}  // namespace gohsp
