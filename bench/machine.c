// What the cores do at the moment: multiply-adds of each, and how long a cache line takes from one to the next.
// Built by machine.py when a run begins, for the processor it runs on; called from Python, which waits meanwhile.

#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <time.h>

// Independent multiply-adds in registers. As many accumulators as registers allow: four cycles of latency times two
// units need eight, and the more the less the loop costs.
#if defined(__AVX512F__)
enum { BYTES = 64, COUNT = 24 };
#elif defined(__AVX__)
enum { BYTES = 32, COUNT = 12 };
#else
enum { BYTES = 16, COUNT = 12 };
#endif
typedef float vector __attribute__((vector_size(BYTES)));

enum { BATCHES = 4 };
// Where other processes have a core, every handover to it waits for a time slice; so long they may all take together.
static const double MOST_S = 1e-3;
static const long OVER = -1;  // the token, when they took longer

// What all threads of a look share, apart from each other: a line that is written would slow its neighbour's readers.
typedef struct {
  _Alignas(128) atomic_int ready;  // how many wait for the others; below zero: one could not be made
  _Alignas(128) atomic_long token;
  _Alignas(128) int threads;
  long handovers;  // of each batch, of each thread
  long steps;
} Shared;

typedef struct {
  Shared *shared;
  int index;
  double gflops;
  double handover_ns;  // the fastest batch's: a thread that is not scheduled delays one batch, not all
  float sum;
} Core;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

static void *look(void *argument) {
  Core *core = argument;
  Shared *shared = core->shared;
  const int threads = shared->threads;
  int ready = atomic_fetch_add(&shared->ready, 1) + 1;
  while (ready >= 0 && ready < threads) ready = atomic_load(&shared->ready);
  if (ready < 0) return NULL;
  // The token goes round: thread i takes it at i, i + threads, ... and passes it on.
  core->handover_ns = MOST_S * 1e9;
  long turn = core->index, token = 0;
  const double latest = now() + MOST_S;
  for (int batch = 0; batch < BATCHES && token != OVER; ++batch) {
    const double began = now();
    for (long k = 0; k < shared->handovers && token != OVER; ++k, turn += threads) {
      for (long spins = 1;; ++spins) {
        token = atomic_load_explicit(&shared->token, memory_order_acquire);
        if (token == turn || token == OVER) break;
        if (spins % 1024 == 0 && now() > latest) atomic_store(&shared->token, OVER);
      }
      // Fails where another thread has just ended it.
      if (token == turn) atomic_compare_exchange_strong(&shared->token, &token, turn + 1);
    }
    const double taken_ns = (now() - began) * 1e9 / ((double)shared->handovers * threads);
    if (token != OVER && taken_ns < core->handover_ns) core->handover_ns = taken_ns;
  }
  vector a[COUNT], b, c;
  for (int i = 0; i < COUNT; ++i) a[i] = (vector){0} + (float)i;
  b = (vector){0} + 1.000001f;
  c = (vector){0} + 1e-9f;
  const double began = now();
  for (long k = 0; k < shared->steps; ++k) {
    _Pragma("GCC unroll 24") for (int i = 0; i < COUNT; ++i) a[i] = a[i] * b + c;
    __asm__ volatile("");
  }
  core->gflops = shared->steps * (double)COUNT * 2 * (BYTES / 4) / (now() - began) / 1e9;
  for (int i = 0; i < COUNT; ++i) core->sum += a[i][0];  // so that nothing is optimised away
  return NULL;
}

// Starts a thread that stays on a core; 0, or an error's number.
static int start(pthread_t *id, Core *core, const cpu_set_t *where) {
  pthread_attr_t attributes;
  int error = pthread_attr_init(&attributes);
  if (error) return error;
  error = pthread_attr_setaffinity_np(&attributes, sizeof *where, where);
  if (!error) error = pthread_create(id, &attributes, look, core);
  pthread_attr_destroy(&attributes);
  return error;
}

// Looks at `threads` cores at once, each from a thread of its own that stays there; the caller's is the first and goes
// back to where it may run. Returns 0, or an error's number where a thread cannot be made or moved.
// gflops: (threads,), of each core. handover_ns: from one core to the next; with one thread, to itself.
int look_at_cores(int threads, const int *cores, long steps, long handovers, double *gflops, double *handover_ns) {
  Core each[threads];
  pthread_t id[threads];
  cpu_set_t before, where;
  Shared shared = {.threads = threads, .handovers = handovers, .steps = steps};
  int error = pthread_getaffinity_np(pthread_self(), sizeof before, &before);
  int made = 0;
  for (; made < threads && !error; made += !error) {
    CPU_ZERO(&where);
    CPU_SET(cores[made], &where);
    each[made] = (Core){.shared = &shared, .index = made};
    // The caller moves first: those it starts later must not find it on their core.
    error = made ? start(&id[made], &each[made], &where) : pthread_setaffinity_np(pthread_self(), sizeof where, &where);
  }
  if (error) atomic_store(&shared.ready, -2 * threads);
  if (made) look(&each[0]);
  for (int i = 1; i < made; ++i) pthread_join(id[i], NULL);
  if (made) pthread_setaffinity_np(pthread_self(), sizeof before, &before);
  for (int i = 0; i < made; ++i) gflops[i] = each[i].gflops;
  *handover_ns = error ? 0 : each[0].handover_ns;
  return error;
}
