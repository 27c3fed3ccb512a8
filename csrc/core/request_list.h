// The requests that have not ended, in the order in which they came: first those that run, then
// those that wait. It is bounded, and never allocates after its construction.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace sidestep {

struct LiveRequest {
  int64_t id;
  int64_t rows;
  int64_t steps;
  int64_t branches;
  int64_t group;
  int64_t remaining;  // rows that are not done, those it has grown by included
};

class RequestList {
 public:
  // No request starts while a row of a running one waits: each of those has a slot at least when
  // another starts, so no more than `capacity` of them run.
  RequestList(int64_t capacity, int64_t queue) : queue_(queue) { list_.reserve(capacity + queue); }

  int64_t running() const { return running_; }
  int64_t waiting() const { return static_cast<int64_t>(list_.size()) - running_; }
  bool full() const { return waiting() >= queue_; }

  // Ids ascend, and the list is not full.
  void push(const LiveRequest& request) { list_.push_back(request); }

  // The one that has waited longest, or null.
  LiveRequest* first_waiting() { return waiting() > 0 ? &list_[running_] : nullptr; }
  void start_first_waiting() { ++running_; }

  // Null once it has ended. Valid until the list changes.
  LiveRequest* find(int64_t id) {
    const auto at = place(id);
    return at != list_.end() && at->id == id ? &*at : nullptr;
  }

  bool runs(int64_t id) { return place(id) - list_.begin() < running_; }

  void erase(int64_t id) {
    const auto at = place(id);
    if (at - list_.begin() < running_) --running_;
    list_.erase(at);
  }

 private:
  std::vector<LiveRequest>::iterator place(int64_t id) {
    return std::lower_bound(list_.begin(), list_.end(), id,
                            [](const LiveRequest& r, int64_t wanted) { return r.id < wanted; });
  }

  int64_t queue_;
  int64_t running_ = 0;            // of list_, from its beginning
  std::vector<LiveRequest> list_;  // ids ascend
};

}  // namespace sidestep
