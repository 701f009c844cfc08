// What a forward pass consists of, in terms of one instruction set's kernels: cutting work into tasks, scratch memory,
// the order of a layer. One call at a time: the pool and the scratch belong to the call that runs.
#include <atomic>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#include "internal.h"
#include "pool.h"

namespace millicent {
namespace {

// Memory that is kept from call to call and only grows.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }
  template <typename T>
  T* take(int64_t count) {
    const size_t bytes = static_cast<size_t>(divide_up(count * static_cast<int64_t>(sizeof(T)), 64)) * 64;
    if (bytes > bytes_) {
      std::free(memory_);
      memory_ = std::aligned_alloc(64, bytes);
      bytes_ = memory_ == nullptr ? 0 : bytes;
      if (memory_ == nullptr) throw std::bad_alloc();
    }
    return static_cast<T*>(memory_);
  }

 private:
  void* memory_ = nullptr;
  size_t bytes_ = 0;
};

struct Workspace {
  std::mutex mutex;
  Pool pool;
  Scratch values, scales, initial, sums;       // panels
  Scratch qkv, attended, activated;            // activations of a layer
  Scratch positions, pieces;                   // of each row
  Scratch runs;                                // of tiles
  Scratch sampled;                             // of each thread
};

// Never destroyed: the pool's threads may outlive the last statement of the process.
Workspace& workspace() {
  static Workspace& instance = *new Workspace;
  return instance;
}

constexpr int64_t kSerialElements = 16384;  // less than this is done sooner than other threads would join in
constexpr int64_t kPanelsPerTask = 16;
constexpr int64_t kMostTasks = 1 << 19;  // the pool counts to twice that

Panels make_panels(Workspace& work, const Kernels& kernels, int32_t format, int64_t rows, int64_t inputs) {
  Panels panels = {};
  panels.format = format;
  panels.rows = rows;
  panels.inputs = inputs;
  panels.count = divide_up(rows, kernels.panel_rows);
  const int64_t groups = rows * inputs / kGroup;
  panels.values = work.values.take<uint8_t>(rows * inputs * (is_quantized(format) ? 1 : value_bits(format) / 8));
  if (is_quantized(format)) {
    panels.scales = work.scales.take<float>(groups);
    panels.initial = work.initial.take<int32_t>(groups);
    panels.sums = work.sums.take<float>(groups);
  }
  return panels;
}

// Cuts tiles into runs, each a share of what is left: answers how many, and writes where each ends.
int64_t guided_runs(int64_t threads, int64_t tiles, int64_t* ends) {
  int64_t runs = 0;
  for (int64_t done = 0; done < tiles; runs++) {
    done += divide_up(tiles - done, 2 * threads);
    if (ends != nullptr) ends[runs] = done;
  }
  return runs;
}

void linear(Workspace& work, const mk_weight& weight, const float* x, int64_t rows, const float* norm, float epsilon,
            int32_t epilogue, float* y) {
  const Kernels& kernels = kernels_in_use();
  const Panels panels = make_panels(work, kernels, weight.format, rows, weight.inputs);
  const int64_t fill_tasks = rows * weight.inputs < kSerialElements ? 1 : least(panels.count, 1 << 16);
  work.pool.run(fill_tasks, [&](int64_t task) {
    for (int64_t p = panels.count * task / fill_tasks; p < panels.count * (task + 1) / fill_tasks; p++) {
      kernels.fill_panel(panels, p, x, norm, epsilon);
    }
  });
  // Few rows: runs of tiles, each read from memory once, long ones first so that threads end together. Many rows: a tile
  // and some panels at a time, so that both fit the cache.
  const int64_t tiles = divide_up(weight.outputs, kTile);
  const int64_t least_panels = divide_up(panels.count * tiles, kMostTasks);
  const int64_t chunks = divide_up(panels.count, least_panels > kPanelsPerTask ? least_panels : kPanelsPerTask);
  const int64_t runs = chunks > 1 ? tiles : guided_runs(work.pool.threads(), tiles, nullptr);
  int64_t* ends = nullptr;
  if (chunks == 1) guided_runs(work.pool.threads(), tiles, ends = work.runs.take<int64_t>(runs));
  work.pool.run(runs * chunks, [&](int64_t task) {
    const int64_t run = task / chunks;
    const int64_t chunk = task % chunks;
    const int64_t end = ends == nullptr ? run + 1 : ends[run];
    for (int64_t tile = ends == nullptr ? run : run == 0 ? 0 : ends[run - 1]; tile < end; tile++) {
      kernels.linear_tile(weight, panels, tile, panels.count * chunk / chunks, panels.count * (chunk + 1) / chunks,
                          epilogue, y);
    }
  });
}

struct RowPlaces {
  int32_t* positions;
  int32_t* pieces;
};

RowPlaces place_rows(Workspace& work, const mk_batch& batch) {
  const RowPlaces places = {work.positions.take<int32_t>(batch.rows), work.pieces.take<int32_t>(batch.rows)};
  for (int64_t piece = 0; piece < batch.pieces; piece++) {
    for (int32_t row = batch.row_offsets[piece]; row < batch.row_offsets[piece + 1]; row++) {
      places.positions[row] = batch.starts[piece] + row - batch.row_offsets[piece];
      places.pieces[row] = static_cast<int32_t>(piece);
    }
  }
  return places;
}

void rotate_and_write(Workspace& work, const mk_shape& shape, const mk_layer& layer, const mk_batch& batch, float* qkv) {
  const Kernels& kernels = kernels_in_use();
  const RowPlaces places = place_rows(work, batch);
  const int64_t width = static_cast<int64_t>(shape.heads + 2 * shape.kv_heads) * shape.head_dim;
  const int64_t tasks = batch.rows * width < kSerialElements ? 1 : least(batch.rows, 1 << 16);
  work.pool.run(tasks, [&](int64_t task) {
    for (int64_t row = batch.rows * task / tasks; row < batch.rows * (task + 1) / tasks; row++) {
      const int32_t piece = places.pieces[row];
      kernels.rotate_and_write({&shape, layer.query_norm, layer.key_norm, layer.keys, layer.values, qkv + row * width,
                                batch.tables + batch.table_offsets[piece], places.positions[row],
                                row + 1 == batch.row_offsets[piece + 1]});
    }
  });
}

void attend(Workspace& work, const mk_shape& shape, const mk_layer& layer, const mk_batch& batch, const float* qkv,
            float* out) {
  const Kernels& kernels = kernels_in_use();
  const int64_t tokens_per_task = kAttentionRows / (shape.heads / shape.kv_heads);
  // Tasks of a piece are as many as its longest rows need; the last rows, which see most, go first.
  int64_t tasks = 0;
  for (int64_t piece = 0; piece < batch.pieces; piece++) {
    tasks += divide_up(batch.row_offsets[piece + 1] - batch.row_offsets[piece], tokens_per_task);
  }
  int32_t* first_task = work.pieces.take<int32_t>(batch.pieces + 1);
  first_task[0] = 0;
  for (int64_t piece = 0; piece < batch.pieces; piece++) {
    const int64_t rows = batch.row_offsets[piece + 1] - batch.row_offsets[piece];
    first_task[piece + 1] = first_task[piece] + static_cast<int32_t>(divide_up(rows, tokens_per_task));
  }
  work.pool.run(tasks * shape.kv_heads, [&](int64_t task) {
    const int64_t unit = tasks - 1 - task / shape.kv_heads;
    int64_t low = 0;
    int64_t high = batch.pieces;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first_task[middle] <= unit ? low : high) = middle;
    }
    const int64_t rows = batch.row_offsets[low + 1] - batch.row_offsets[low];
    const int64_t first = (unit - first_task[low]) * tokens_per_task;
    kernels.attend({&shape, layer.keys, layer.values, qkv, out, batch.tables + batch.table_offsets[low],
                    batch.row_offsets[low], batch.starts[low], first, least(first + tokens_per_task, rows),
                    static_cast<int32_t>(task % shape.kv_heads)});
  });
}

void decode_layers(Workspace& work, const mk_shape& shape, const mk_layer* layers, int64_t count, const mk_batch& batch,
                   float* hidden) {
  const int64_t rows = batch.rows;
  const int64_t query_width = static_cast<int64_t>(shape.heads) * shape.head_dim;
  const int64_t qkv_width = query_width + 2LL * shape.kv_heads * shape.head_dim;
  float* qkv = work.qkv.take<float>(rows * qkv_width);
  float* attended = work.attended.take<float>(rows * query_width);
  float* activated = work.activated.take<float>(rows * shape.intermediate);
  for (int64_t i = 0; i < count; i++) {
    const mk_layer& layer = layers[i];
    linear(work, layer.qkv, hidden, rows, layer.attention_norm, shape.norm_epsilon, MK_STORE, qkv);
    rotate_and_write(work, shape, layer, batch, qkv);
    attend(work, shape, layer, batch, qkv, attended);
    linear(work, layer.output, attended, rows, nullptr, 0.0F, MK_ADD, hidden);
    linear(work, layer.gate_up, hidden, rows, layer.feed_forward_norm, shape.norm_epsilon, MK_SILU_MUL, activated);
    linear(work, layer.down, activated, rows, nullptr, 0.0F, MK_ADD, hidden);
  }
}

// Each row is a task, so that a thread which is not scheduled holds up no more than one; it takes memory that nobody
// uses just then, of which there is as much as there are threads.
template <typename Body>
void each_row(Workspace& work, int64_t count, int64_t columns, const Body& body) {
  const int64_t places = least(count, work.pool.threads());
  const int64_t bytes = divide_up(kernels_in_use().sample_scratch_bytes(columns), 64) * 64;
  uint8_t* scratch = work.sampled.take<uint8_t>(places * bytes);
  std::vector<std::atomic_flag> taken(static_cast<size_t>(places));
  work.pool.run(count, [&](int64_t row) {
    int64_t place = 0;
    while (taken[static_cast<size_t>(place)].test_and_set(std::memory_order_acquire)) place = (place + 1) % places;
    body(row, scratch + place * bytes);
    taken[static_cast<size_t>(place)].clear(std::memory_order_release);
  });
}

// Runs a call with the workspace for itself. Only taking scratch can fail, never a task on another thread.
template <typename Body>
int32_t answer(const Body& body) {
  Workspace& work = workspace();
  const std::lock_guard<std::mutex> lock(work.mutex);
  try {
    body(work);
  } catch (const std::bad_alloc&) {
    return -1;
  }
  return 0;
}

}  // namespace
}  // namespace millicent

using namespace millicent;

extern "C" {

int32_t mk_use_threads(int32_t threads) {
  Workspace& work = workspace();
  const std::lock_guard<std::mutex> lock(work.mutex);
  return work.pool.resize(threads < 1 ? 1 : threads);
}

int32_t mk_linear(const mk_weight* weight, const float* x, int64_t rows, const float* norm, float norm_epsilon,
                  int32_t epilogue, float* y) {
  return answer([&](Workspace& work) { linear(work, *weight, x, rows, norm, norm_epsilon, epilogue, y); });
}

int32_t mk_rotate_and_write(const mk_shape* shape, const mk_layer* layer, const mk_batch* batch, float* qkv) {
  return answer([&](Workspace& work) { rotate_and_write(work, *shape, *layer, *batch, qkv); });
}

int32_t mk_attend(const mk_shape* shape, const mk_layer* layer, const mk_batch* batch, const float* qkv, float* out) {
  return answer([&](Workspace& work) { attend(work, *shape, *layer, *batch, qkv, out); });
}

int32_t mk_decode_layers(const mk_shape* shape, const mk_layer* layers, int64_t count, const mk_batch* batch,
                         float* hidden) {
  return answer([&](Workspace& work) { decode_layers(work, *shape, layers, count, *batch, hidden); });
}

int32_t mk_sample(const mk_draw* draws, int64_t count, int64_t columns, int64_t* tokens) {
  const auto sample = kernels_in_use().sample_row;
  return answer([&](Workspace& work) {
    each_row(work, count, columns, [&](int64_t row, void* scratch) { tokens[row] = sample(draws[row], columns, scratch); });
  });
}

int32_t mk_score(const float* const* rows, int64_t count, int64_t columns, int64_t top, int64_t* best,
                 double* log_sums) {
  const auto score = kernels_in_use().score_row;
  return answer([&](Workspace& work) {
    each_row(work, count, columns, [&](int64_t row, void* scratch) {
      log_sums[row] = score(rows[row], columns, top, best + row * top, scratch);
    });
  });
}

}  // extern "C"
