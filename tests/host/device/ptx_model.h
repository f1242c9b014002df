#pragma once

// What csrc/cuda/ptx.cuh has, in the model of device.h.

namespace harlora::cuda {

template <typename T>
inline constexpr bool is_bfloat16 = std::is_same_v<T, __nv_bfloat16>;

// Shared memory by 32-bit addresses: as far from the model's as they say.
inline uint32_t address_of_shared(const void* place) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(place) - &device_model::shared[0][0]);
}
inline uint8_t* place_in_shared(uint32_t address) {
  return &device_model::shared[0][0] + static_cast<int32_t>(address);
}
inline uint8_t* dynamic_shared() { return device_model::shared[device_model::self->block->rank]; }

// "Matrix Fragments for mma.m16n8k16": a0..a7, b0..b3 and c0..c3 of the lane whose groupID is lane >> 2 and whose
// threadID_in_group is lane % 4.
template <typename T>
void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  device_model::Warp& warp = *device_model::self->warp;
  const int own = device_model::self->lane;
  std::memcpy(&warp.given[own][0], a, 16);
  std::memcpy(&warp.given[own][4], b, 8);
  std::memcpy(&warp.given[own][6], sums, 16);
  device_model::meet(warp.meeting, "mma.sync", [&] {
    float A[16][16], B[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane >> 2, thread = lane % 4;
      for (int i = 0; i < 8; ++i) {
        const int row = (i < 2 || (4 <= i && i < 6)) ? group : group + 8;
        const int column = i < 4 ? thread * 2 + (i & 1) : thread * 2 + (i & 1) + 8;
        A[row][column] = value_of(half_of(warp.given[lane][i / 2], i % 2), is_bfloat16<T>);
      }
      for (int i = 0; i < 4; ++i) {
        const int row = i < 2 ? thread * 2 + (i & 1) : thread * 2 + (i & 1) + 8;
        B[row][group] = value_of(half_of(warp.given[lane][4 + i / 2], i % 2), is_bfloat16<T>);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      float C[4];
      std::memcpy(C, &warp.given[lane][6], 16);
      for (int i = 0; i < 4; ++i) {
        const int row = i < 2 ? lane >> 2 : (lane >> 2) + 8, column = (lane % 4) * 2 + (i & 1);
        for (int k = 0; k < 16; ++k) C[i] += A[row][k] * B[k][column];
      }
      std::memcpy(warp.taken[lane], C, 16);
    }
  });
  std::memcpy(sums, warp.taken[own], 16);
}

// "movmatrix": each lane has elements (row lane / 4, columns 2·(lane % 4) and the next) of an 8×8 matrix.
inline uint32_t transposed(uint32_t pair) {
  device_model::Warp& warp = *device_model::self->warp;
  const int own = device_model::self->lane;
  warp.given[own][0] = pair;
  device_model::meet(warp.meeting, "movmatrix", [&] {
    for (int lane = 0; lane < 32; ++lane) {
      uint32_t result = 0;
      for (int i = 0; i < 2; ++i) {
        const int row = lane / 4, column = 2 * (lane % 4) + i;  // of the result; of what is given the other way round
        result |= static_cast<uint32_t>(half_of(warp.given[4 * column + row / 2][0], row % 2)) << (16 * i);
      }
      warp.taken[lane][0] = result;
    }
  });
  return warp.taken[own][0];
}

// "ldmatrix .x2 .trans": lanes 0 to 7 name the rows of the first matrix, 8 to 15 those of the second.
inline void load_transposed(uint32_t (&b)[2], uint32_t address) {
  device_model::Warp& warp = *device_model::self->warp;
  const int own = device_model::self->lane;
  warp.given[own][0] = address;
  device_model::meet(warp.meeting, "ldmatrix", [&] {
    for (int lane = 0; lane < 32; ++lane) {
      for (int matrix = 0; matrix < 2; ++matrix) {
        uint32_t result = 0;
        for (int i = 0; i < 2; ++i) {
          const int row = 2 * (lane % 4) + i, column = lane / 4;
          const uint32_t from = warp.given[8 * matrix + row][0];
          if (from % 16) device_model::fail("ldmatrix of a row that is not at a multiple of 16 bytes");
          uint16_t bits;
          std::memcpy(&bits, place_in_shared(from) + 2 * column, 2);
          result |= static_cast<uint32_t>(bits) << (16 * i);
        }
        warp.taken[lane][matrix] = result;
      }
    }
  });
  b[0] = warp.taken[own][0], b[1] = warp.taken[own][1];
}

template <typename Words>
Words loaded(const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(Words)) device_model::fail("a load that is not aligned");
  Words words;
  std::memcpy(&words, from, sizeof words);
  return words;
}
inline int64_t bytes_read_once = 0;
inline uint2 load_once(const void* from) {
  bytes_read_once += sizeof(uint2);
  return loaded<uint2>(from);
}
inline uint2 load_shared_8(uint32_t address) { return loaded<uint2>(place_in_shared(address)); }
inline uint4 load_shared_16(uint32_t address) { return loaded<uint4>(place_in_shared(address)); }
inline uint32_t load_shared(uint32_t address) { return loaded<uint32_t>(place_in_shared(address)); }
inline void store_shared(uint32_t address, uint32_t word) { std::memcpy(place_in_shared(address), &word, 4); }
inline void store_shared_16(uint32_t address, const uint4& words) {
  if (address % 16) device_model::fail("a store that is not aligned");
  std::memcpy(place_in_shared(address), &words, 16);
}

inline uint32_t load_shared_2(uint32_t address) { return loaded<uint16_t>(place_in_shared(address)); }
inline uint32_t load_shared_4(uint32_t address) { return load_shared(address); }

// As late or as early as it may be, by chance.
inline void copy_async(uint32_t to, const void* from, bool there) {
  const device_model::Copy copy{place_in_shared(to), from, there ? 16u : 0u, there ? 0u : 16u};
  if (reinterpret_cast<uintptr_t>(copy.to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) {
    device_model::fail("a copy that is not aligned");
  }
  static std::mt19937 random;
  if (random() % 2) {
    device_model::carry_out(copy);
  } else {
    device_model::self->copies.push_back(copy);
  }
}
inline void copy_once(uint32_t to, const void* from, bool there) {
  bytes_read_once += there ? 16 : 0;
  copy_async(to, from, there);
}
inline void prefetch(const void*) {}
inline void copy_commit() {
  device_model::self->groups.push_back(std::move(device_model::self->copies));
  device_model::self->copies.clear();
}
template <int kPending>
void copy_wait() {
  auto& groups = device_model::self->groups;
  for (; groups.size() > kPending; groups.pop_front()) {
    for (const auto& copy : groups.front()) device_model::carry_out(copy);
  }
}

inline void show_to_async_units() {}
inline void cluster_barrier() {
  device_model::meet(device_model::of_cluster, "barrier.cluster", [] {});
}
inline uint32_t shared_of(uint32_t block, uint32_t address) {
  const auto place = static_cast<int32_t>(address) - static_cast<int32_t>(device_model::self->block->rank *
                                                                          device_model::kShared);
  if (place < 0 || place >= static_cast<int32_t>(device_model::kShared) || block >= device_model::cluster_size) {
    device_model::fail("mapa of what is not dynamic shared memory of the cluster");
  }
  return static_cast<uint32_t>(place + block * device_model::kShared);
}
inline float4 load_cluster(uint32_t address) { return loaded<float4>(place_in_shared(address)); }

// mbarrier with one thread that arrives. Bytes on their way come by chance, at the latest when all that they are
// awaited by has no more to do.
struct Arrivals {
  int32_t bytes;  // that are expected and not yet there, or are there and not yet expected
  int16_t pending;
  uint16_t turn;
};
struct OnTheirWay {
  uint32_t address, arrivals;
  uint4 words;
};
inline std::vector<OnTheirWay> on_their_way;

inline Arrivals& arrivals_at(uint32_t address) {
  if (address % 8) device_model::fail("an mbarrier that is not aligned");
  return *reinterpret_cast<Arrivals*>(place_in_shared(address));
}
inline void turn_if_all_there(Arrivals& arrivals) {
  if (arrivals.pending || arrivals.bytes) return;
  arrivals.pending = 1;
  ++arrivals.turn;
}
inline void arrivals_begin(uint32_t address) {
  on_their_way.clear();
  arrivals_at(address) = {0, 1, 0};
}
inline void arrivals_expect(uint32_t address, int bytes) {
  Arrivals& arrivals = arrivals_at(address);
  if (arrivals.pending != 1) device_model::fail("more threads arrive at an mbarrier than it has");
  arrivals.pending = 0;
  arrivals.bytes += bytes;
  turn_if_all_there(arrivals);
}
inline void arrive(const OnTheirWay& sent) {
  std::memcpy(place_in_shared(sent.address), &sent.words, sizeof sent.words);
  Arrivals& arrivals = arrivals_at(sent.arrivals);
  arrivals.bytes -= sizeof sent.words;
  turn_if_all_there(arrivals);
}
inline void store_async(uint32_t address, uint4 words, uint32_t arrivals) {
  if (address % 16) device_model::fail("st.async of 16 bytes that is not aligned");
  if (address / device_model::kShared != arrivals / device_model::kShared) {
    device_model::fail("st.async to one block and the mbarrier of another");
  }
  const OnTheirWay sent{address, arrivals, words};
  static std::mt19937 random;
  if (random() % 2) {
    arrive(sent);
  } else {
    on_their_way.push_back(sent);
  }
}
inline void arrivals_wait(uint32_t address, int parity) {
  static std::mt19937 random;
  for (int turn = 0; (arrivals_at(address).turn & 1) == parity; ++turn) {
    if (turn > 10000) device_model::fail("a thread waits for bytes that never come");
    if (!on_their_way.empty() && random() % 4 == 0) {
      const size_t which = random() % on_their_way.size();
      const OnTheirWay sent = on_their_way[which];
      on_their_way[which] = on_their_way.back();
      on_their_way.pop_back();
      arrive(sent);
    }
    swapcontext(&device_model::self->context, &device_model::scheduler);
  }
}
inline void let_next_start() {}
inline void wait_for_previous() {}

}  // namespace harlora::cuda
