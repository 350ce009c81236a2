#include "radix_select.h"

#include <algorithm>
#include <atomic>
#include <memory>

#include "bracket_search.h"
#include "counting_search.h"
#include "visit.h"

namespace pdp::cpu {
namespace {

// A list of fewer elements is not worth a second thread.
constexpr int64_t kSerial = 1 << 15;

std::unique_ptr<Search> make_search(const Weight& weight, int64_t k) {
  std::unique_ptr<Search> search;
  if (k <= 0 || k >= weight.numel) return search;
  visit(weight.data, weight.type, [&](const auto* data) {
    using Stored = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
    if constexpr (sizeof(Stored) == 2) {
      if (weight.numel > kWholeGather) {
        search = std::make_unique<CountingSearch<Stored>>(data, k);
        return;
      }
    }
    search = std::make_unique<BracketSearch<Stored>>(data, weight.numel, k);
  });
  return search;
}

}  // namespace

std::vector<OrderStatistics> radix_select(const std::vector<Weight>& weights, const int64_t* k,
                                          ParallelFor parallel_for) {
  struct Tile {
    size_t weight;
    int64_t begin;
    int64_t end;
  };
  const int64_t count = static_cast<int64_t>(weights.size());
  int64_t numel = 0;
  for (const Weight& weight : weights) numel += weight.numel;
  const auto grain = [&](int64_t items) { return numel < kSerial ? items : 1; };

  std::vector<std::unique_ptr<Search>> searches(count);
  parallel_for(count, grain(count), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) searches[i] = make_search(weights[i], k[i]);
  });

  std::vector<OrderStatistics> found(count);
  std::vector<size_t> pending;
  for (int64_t i = 0; i < count; ++i) {
    if (searches[i]) pending.push_back(i);
  }
  std::vector<std::atomic<int64_t>> tiles_left(count);
  while (!pending.empty()) {
    std::vector<Tile> tiles;
    for (const size_t i : pending) {
      const int64_t step = searches[i]->tile();
      tiles_left[i] = (weights[i].numel + step - 1) / step;
      for (int64_t begin = 0; begin < weights[i].numel; begin += step) {
        tiles.push_back({i, begin, std::min(weights[i].numel, begin + step)});
      }
    }
    // Who finishes a weight concludes it, so that the next ones use its memory again.
    parallel_for(tiles.size(), grain(tiles.size()), [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at) {
        const Tile& tile = tiles[at];
        std::unique_ptr<Search>& search = searches[tile.weight];
        search->scan(tile.begin, tile.end);
        if (--tiles_left[tile.weight] == 0 && search->conclude()) {
          found[tile.weight] = search->found;
          search.reset();
        }
      }
    });
    const auto is_done = [&](size_t i) { return searches[i] == nullptr; };
    pending.erase(std::remove_if(pending.begin(), pending.end(), is_done), pending.end());
  }
  return found;
}

}  // namespace pdp::cpu
