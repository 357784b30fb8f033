// Many loops at once through one small pool, some begun by its own threads: each has to end.

#include <atomic>

#include "driver.h"

namespace quire::driver {
namespace {

struct Job {
  Threads& pool;
  int num_threads;
  uint64_t seed;
  std::atomic<int>& num_open;
  std::atomic<int>& num_wrong;

  // Loops of which every chunk has to run once.
  void run() {
    Random random(seed);
    Team team(pool, num_threads);
    for (int loop = 0; loop < 60; ++loop) {
      std::vector<std::atomic<int>> runs(random.between(0, 40));
      team.run(static_cast<int64_t>(runs.size()), [&](int64_t chunk) { ++runs[chunk]; });
      for (const auto& count : runs) num_wrong += count.load() != 1;
      std::vector<int> owners(random.between(1, 200));
      team.split(static_cast<int64_t>(owners.size()), random.between(1, 20), random.between(1, 8),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) ++owners[i];
                 });
      for (const int count : owners) num_wrong += count != 1;
    }
    --num_open;
  }
};

}  // namespace

void check_teams(uint64_t seed) {
  Case result("any level", "teams", seed);
  const Watchdog watchdog("teams", 120);
  constexpr int kTeams = 64, kOutside = 8;
  Threads pool(2);
  std::atomic<int> num_open{kTeams}, num_wrong{0};
  std::vector<Job> jobs;
  for (int i = 0; i < kTeams; ++i) {
    jobs.push_back({pool, 1 + i % 6, seed * kTeams + i, num_open, num_wrong});
  }
  std::vector<std::thread> threads;
  for (int i = 0; i < kOutside; ++i) {
    threads.emplace_back([&, i] {
      for (int n = i; n < kTeams / 2; n += kOutside) jobs[n].run();
    });
  }
  for (int n = kTeams / 2; n < kTeams; ++n) {
    pool.schedule([](void* job) { static_cast<Job*>(job)->run(); }, &jobs[n]);
  }
  for (std::thread& thread : threads) thread.join();
  while (num_open > 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  if (num_wrong > 0) result.fail("%d chunks did not run once", num_wrong.load());
}

}  // namespace quire::driver
