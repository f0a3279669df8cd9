// What the machine can do, by itself:   limits read BYTES THREADS   |   limits bf16 THREADS   |   limits int8 THREADS
// Prints bytes or operations a second: the median of several repetitions.
#define _GNU_SOURCE
#include <immintrin.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { MAX_THREADS = 256, REPETITIONS = 12, ROUNDS = 20000 };

typedef struct {
    const char *start;
    size_t bytes;
    int mode;
    double operations;
    uint64_t sink;
} Job;

static pthread_barrier_t barrier;
static double times[REPETITIONS + 1];

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

// Sums whole cache lines in eight streams of registers: as fast as they come.
static uint64_t read_all(const char *p, size_t bytes) {
    typedef uint64_t Line __attribute__((vector_size(64), aligned(64)));
    Line s[8] = {0};
    const Line *lines = (const Line *)p;
    for (size_t i = 0; i + 8 <= bytes / 64; i += 8) {
        for (int j = 0; j < 8; j++) s[j] ^= lines[i + j];
    }
    uint64_t x = 0;
    for (int j = 0; j < 8; j++)
        for (int k = 0; k < 8; k++) x ^= s[j][k];
    return x;
}

// Multiply-adds from registers alone. Returns operations done (a multiply and an add count as two).
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
static double compute(Job *job) {
    static _Alignas(64) char zeros[1024];
    struct { uint8_t palette, start_row, reserved[14]; uint16_t columns[16]; uint8_t rows[16]; } c;
    memset(&c, 0, sizeof c);
    c.palette = 1;
    for (int i = 0; i < 8; i++) { c.columns[i] = 64; c.rows[i] = 16; }
    syscall(SYS_arch_prctl, 0x1023, 18);  // ARCH_REQ_XCOMP_PERM, tile data
    _tile_loadconfig(&c);
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    _tile_loadd(4, zeros, 64); _tile_loadd(5, zeros, 64); _tile_loadd(6, zeros, 64); _tile_loadd(7, zeros, 64);
    for (int i = 0; i < ROUNDS; i++) {
        if (job->mode == 'b') {
            _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
        } else {
            _tile_dpbssd(0, 4, 6); _tile_dpbssd(1, 4, 7); _tile_dpbssd(2, 5, 6); _tile_dpbssd(3, 5, 7);
        }
    }
    _tile_release();
    return 2.0 * 4 * ROUNDS * 16 * 16 * (job->mode == 'b' ? 32 : 64);
}
#elif defined(__AVX512BF16__) && defined(__AVX512VNNI__)
static double compute(Job *job) {
    __m512 f[12]; __m512i n[12];
    __m512i x = _mm512_set1_epi32((int)(intptr_t)job->start);
    for (int j = 0; j < 12; j++) { f[j] = _mm512_setzero_ps(); n[j] = _mm512_setzero_si512(); }
    for (int i = 0; i < ROUNDS; i++) {
        for (int j = 0; j < 12; j++) {
            if (job->mode == 'b') f[j] = _mm512_dpbf16_ps(f[j], (__m512bh)x, (__m512bh)x);
            else n[j] = _mm512_dpbusd_epi32(n[j], x, x);
        }
    }
    for (int j = 0; j < 12; j++) job->sink += (uint64_t)f[j][0] + (uint64_t)n[j][0];
    return 2.0 * 12 * ROUNDS * (job->mode == 'b' ? 32 : 64);
}
#else
static double compute(Job *job) {  // float32: what such a processor computes bfloat16 and int8 products in
    typedef float Vector __attribute__((vector_size(32)));
    Vector s[12] = {0}, x = {1.0f + job->bytes};
    for (int i = 0; i < ROUNDS; i++)
        for (int j = 0; j < 12; j++) s[j] += x * x;
    for (int j = 0; j < 12; j++) job->sink += (uint64_t)s[j][0];
    return 2.0 * 12 * ROUNDS * 8;
}
#endif

static void *work(void *argument) {
    Job *job = argument;
    for (int r = 0; r < REPETITIONS; r++) {
        if (pthread_barrier_wait(&barrier) == PTHREAD_BARRIER_SERIAL_THREAD) times[r] = now();
        pthread_barrier_wait(&barrier);
        if (job->mode == 'r') job->sink += read_all(job->start, job->bytes);
        else job->operations = compute(job);
        if (pthread_barrier_wait(&barrier) == PTHREAD_BARRIER_SERIAL_THREAD) times[r] = now() - times[r];
    }
    return NULL;
}

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int count, char **arguments) {
    if (count < 3) return 2;
    int mode = arguments[1][0], reads = mode == 'r';
    size_t bytes = reads ? strtoull(arguments[2], NULL, 10) : 0;
    int threads = atoi(arguments[reads ? 3 : 2]);
    if (threads < 1 || threads > MAX_THREADS) return 2;
    char *memory = NULL;
    size_t part = bytes / threads / 4096 * 4096;
    if (reads) {
        size_t whole = part * threads + (4 << 20);
        memory = mmap(NULL, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) return 1;
        memory = (char *)(((uintptr_t)memory + (2 << 20) - 1) & ~(uintptr_t)((2 << 20) - 1));
        madvise(memory, part * threads, MADV_HUGEPAGE);
        memset(memory, 1, part * threads);
    }
    pthread_t ids[MAX_THREADS];
    static Job jobs[MAX_THREADS];
    pthread_barrier_init(&barrier, NULL, threads);
    for (int t = 0; t < threads; t++) {
        jobs[t] = (Job){memory + t * part, part, mode, 0, 0};
        pthread_create(&ids[t], NULL, work, &jobs[t]);
    }
    uint64_t sink = 0;
    double operations = 0;
    for (int t = 0; t < threads; t++) {
        pthread_join(ids[t], NULL);
        sink ^= jobs[t].sink;
        operations += jobs[t].operations;
    }
    qsort(times + 1, REPETITIONS - 1, sizeof *times, by_size);  // the first warms up
    printf("%.6g\n", (reads ? (double)part * threads : operations) / times[1 + (REPETITIONS - 1) / 2]);
    return sink == 42 ? 3 : 0;
}
