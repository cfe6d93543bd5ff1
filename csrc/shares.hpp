// Who works on what in a step. What a thread wrote lies in its own caches, from which other cores fetch it slowly, so in
// every phase each thread begins with the same rows and columns.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.hpp"
#include "pool.hpp"

namespace native {

struct Range {
  int64_t begin, end;

  int64_t size() const { return std::max<int64_t>(end - begin, 0); }
  // The index-th of `count` nearly equal parts.
  Range part(int64_t index, int64_t count) const {
    const int64_t whole = end - begin;
    return {begin + whole * index / count, begin + whole * (index + 1) / count};
  }
  Range operator&(const Range& other) const { return {std::max(begin, other.begin), std::min(end, other.end)}; }
};

// A step's rows by its columns (outputs of a matrix, heads) as a grid of shares, one for each thread, or fewer, and then the
// other threads help. Few rows are not divided: then a share is columns, of which a thread multiplies the weights, and
// attends to the heads. Many rows are: then a thread's products read rows of its own, too, and all threads read all weights.
class Shares {
 public:
  Shares(int64_t rows, int64_t threads)
      : rows_(rows),
        row_parts_(std::clamp<int64_t>(rows / (kRowsForEach * threads), 1, std::min(threads, Team::kMostShares))),
        column_parts_(std::min(threads, Team::kMostShares) / row_parts_) {}

  int64_t count() const { return row_parts_ * column_parts_; }
  Range rows(int64_t share) const {
    const auto bound = [&](int64_t part) { return part == row_parts_ ? rows_ : rows_ * part / row_parts_ / kLanes * kLanes; };
    return {bound(share / column_parts_), bound(share / column_parts_ + 1)};
  }
  // The share's part of `all`, columns or whatever the shares of the same rows divide among themselves.
  Range part_of(Range all, int64_t share) const { return all.part(share % column_parts_, column_parts_); }

 private:
  // The fewest rows of a part for each thread. Every part reads all weights, and with so many rows that takes less time
  // than the arithmetic, however many threads share the memory.
  static constexpr int64_t kRowsForEach = 32;

  int64_t rows_, row_parts_, column_parts_;
};

// Calls body(row, column) for every row and each of `columns` columns; rows(share) are a share's rows, or what stands for
// them. All threads call it and meet at its end. A thread takes `most` of them at a time at most.
template <class Rows, class Body>
void for_each_cell(Team& team, int thread, const Shares& shares, int64_t columns, int64_t most, Rows&& rows, Body&& body) {
  const auto own = [&](int64_t share) { return shares.part_of({0, columns}, share); };
  const auto cells = [&](int64_t share) { return rows(share).size() * own(share).size(); };
  team.for_each_share(thread, shares.count(), most, cells, [&](int64_t share, int64_t begin, int64_t end) {
    const Range across = own(share);
    const int64_t first = rows(share).begin;
    for (int64_t i = begin; i < end; ++i) body(first + i / across.size(), across.begin + i % across.size());
  });
}

// The same with the shares' own rows.
template <class Body>
void for_each_cell(Team& team, int thread, const Shares& shares, int64_t columns, int64_t most, Body&& body) {
  for_each_cell(team, thread, shares, columns, most, [&](int64_t share) { return shares.rows(share); }, body);
}

}  // namespace native
