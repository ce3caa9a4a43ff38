// SPDX-License-Identifier: Apache-2.0
// How many workers a call should use on a machine that has other things to do.
//
// Workers that share an image meet after every attention. One that loses its core in the middle of a task holds up the
// others for a time slice each time, and that soon costs more than it brings. So a call that was held up for an eighth
// of its time leaves one worker out for the calls that follow; after a
// pause that doubles each time, all are tried again. A call that is not held up shortens the next pause by one call:
// a single hiccup costs one call, and a core that stays busy is left alone but for one call in some sixty.
#pragma once

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
class Absences {
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

class Crew {
 public:
  static constexpr int64_t kLongestPause = 64;  // calls

  // How many of so many workers the next call should use.
  int64_t next_size(int64_t workers) const {
    const int64_t missing = left_ > 0 ? missing_ : 0;
    return workers > missing ? workers - missing : 1;
  }

  // Of a call that has ended: how many workers it had, how long it took and how long it was held up.
  void report(int64_t workers, int64_t span, int64_t lost) {
    if (left_ == 0) missing_ = 0;
    left_ -= left_ > 0;
    if (workers < 2) return;
    if (8 * lost > span) {
      pause_ = pause_ == 0 ? 1 : (2 * pause_ < kLongestPause ? 2 * pause_ : kLongestPause);
      left_ = pause_;
      ++missing_;
    } else if (missing_ == 0 && pause_ > 0) {
      --pause_;
    }
  }

 private:
  int64_t missing_ = 0;  // workers that are left out
  int64_t left_ = 0;     // calls until all are tried again
  int64_t pause_ = 0;    // calls that the last absence was worth
};

// The crew of the calling thread.
Crew& crew();

}  // namespace gohsp
