// The fewest best ids of a row whose measures add up to something: the key of the last of them.
//
// Two passes over the row, whatever is wanted: the first adds the measures of ids up by their distance from the best one; the
// second lists the ids at the distance at which the sum is reached, of which a warp then finds the key bit by bit. Where too
// many ids lie at that distance to be listed, as with many equal logits, the bits are found by passes over the row.
#pragma once

#include "ranks.cuh"

// Distances from the best logit that are told apart, to a logit of 1 or to a factor of e of the probability.
constexpr float FINENESS = 64.0f;
// Distances told apart; ids listed.
constexpr u32 BINS = 2048, BINS_A_THREAD = BINS / RANK_THREADS, LISTED = 1024;

// What is asked: `bins` distances to a logit of 1, of which `last` and all behind it are one; ids with keys below `floor` are out.
struct Narrowing {
    float best, bins;
    u32 last;
    u64 floor;

    // A higher logit never has a higher one.
    __device__ __forceinline__ u32 bin(float logit) const {
        return static_cast<u32>(fminf((best - logit) * bins, static_cast<float>(last)));
    }
};

// Where a sum is reached, and what it is before.
struct Reached {
    u32 bin;
    u64 before;
};

// Ids of one bin.
struct List {
    u64 keys[LISTED], measures[LISTED];
};

// What the search works with, in shared memory.
struct Search {
    List list;
    alignas(8) unsigned char sums[BINS * sizeof(u64)];
};

// The sums of measures by bin; the sum of all.
template <class Sum, class Measure>
__device__ __forceinline__ u64 fill_bins(const Row& row, const Narrowing& narrowing, Measure measure, Sum* sums) {
    for (u32 bin = threadIdx.x; bin < BINS; bin += RANK_THREADS) sums[bin] = 0;
    __syncthreads();
    // Most ids are far away: each thread adds up its own of these.
    u64 far = 0;
    for_ids(row, [&](u32 id, float logit) {
        if (rank_key(logit, id) < narrowing.floor) return;
        u32 bin = narrowing.bin(logit);
        Sum value = measure(logit);
        if (bin == narrowing.last) far += value;
        else atomicAdd(&sums[bin], value);
    });
    far = warp_sum(far);
    if (threadIdx.x % 32 == 0 && far > 0) atomicAdd(&sums[narrowing.last], static_cast<Sum>(far));
    __syncthreads();
    u64 own = 0, total;
    for (u32 i = 0; i < BINS_A_THREAD; i++) own += sums[threadIdx.x * BINS_A_THREAD + i];
    sum_before(own, total);
    return total;
}

// The first bin with which the sums reach `wanted`, which is at most all of them.
template <class Sum>
__device__ __forceinline__ Reached reach(const Sum* sums, u64 wanted) {
    SHARED(Reached, reached, [1]);
    u32 first = threadIdx.x * BINS_A_THREAD;
    u64 own = 0, total;
    for (u32 i = 0; i < BINS_A_THREAD; i++) own += sums[first + i];
    u64 before = sum_before(own, total);
    if (before < wanted && wanted <= before + own) {
        while (before + sums[first] < wanted) before += sums[first++];
        reached[0] = {first, before};
    }
    __syncthreads();
    return reached[0];
}

// Lists the ids of a bin; how many there are, which may be more than were listed.
template <class Measure>
__device__ __forceinline__ u32 list_bin(const Row& row, const Narrowing& narrowing, u32 bin, Measure measure, List& list) {
    SHARED(u32, count, [1]);
    if (threadIdx.x == 0) count[0] = 0;
    __syncthreads();
    for_ids(row, [&](u32 id, float logit) {
        u64 key = rank_key(logit, id);
        if (key < narrowing.floor || narrowing.bin(logit) != bin) return;
        u32 at = atomicAdd(&count[0], 1u);
        if (at >= LISTED) return;
        list.keys[at] = key;
        list.measures[at] = measure(logit);
    });
    __syncthreads();
    return count[0];
}

// The highest key from which on the measures of the list add up to `wanted`.
__device__ __forceinline__ u64 search_list(const List& list, u32 count, u64 wanted) {
    SHARED(u64, found, [1]);
    if (threadIdx.x < 32) {
        u64 threshold = 0;
        for (int bit = 63; bit >= 0; bit--) {
            u64 higher = threshold | u64{1} << bit, sum = 0;
            for (u32 at = threadIdx.x; at < count; at += 32) sum += list.keys[at] >= higher ? list.measures[at] : 0;
            if (warp_sum(sum) >= wanted) threshold = higher;
        }
        if (threadIdx.x == 0) found[0] = threshold;
    }
    __syncthreads();
    return found[0];
}

// The same of the row.
template <class Measure>
__device__ __forceinline__ u64 search_row(const Row& row, Measure measure, u64 wanted) {
    u64 threshold = 0;
    for (int bit = 63; bit >= 0; bit--) {
        u64 higher = threshold | u64{1} << bit, sum = 0, total;
        for_ids(row, [&](u32 id, float logit) {
            if (rank_key(logit, id) >= higher) sum += measure(logit);
        });
        sum_before(sum, total);
        if (total >= wanted) threshold = higher;
    }
    return threshold;
}

// The key of the last of the fewest best ids whose `measure(logit)`, u32 or u64, adds up to `wanted(sum of all)`; the floor where
// all of them do not. The highest logit of the row that may be drawn is `best`.
template <class Measure, class Wanted>
__device__ __forceinline__ u64 last_of_best(
    const Row& row, const Narrowing& narrowing, Search& search, Measure measure, Wanted wanted_of) {
    auto* sums = reinterpret_cast<decltype(measure(0.0f))*>(search.sums);
    u64 total = fill_bins(row, narrowing, measure, sums), wanted = wanted_of(total);
    if (wanted > total) return narrowing.floor;
    Reached reached = reach(sums, wanted);
    u32 count = list_bin(row, narrowing, reached.bin, measure, search.list);
    return count <= LISTED ? search_list(search.list, count, wanted - reached.before) : search_row(row, measure, wanted);
}

// The key of the last of the `count` best ids of those that may be drawn.
__device__ __forceinline__ u64 last_of_count(const Row& row, float best, Search& search, u32 count) {
    Narrowing narrowing{best, FINENESS, BINS - 1, 0};
    return last_of_best(row, narrowing, search, [](float) { return 1u; }, [&](u64) { return u64{count}; });
}
