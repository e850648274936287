#include "score.cuh"

// out [S]: the score of each of the rows of logits [R, V] that asked [S] names, for its token of tokens [R]; likely [S, pitch]:
// its most likely tokens, as many as are asked for. V is at most 2^20. Grid: S.
KERNEL_BOUNDS(score, (RANK_THREADS, 2), const float* logits, const Scored* asked, const u32* tokens, Score* out, Likely* likely,
              u32 vocab, u32 pitch) {
    Scored of = asked[blockIdx.x];
    Row row{logits + u64{of.row} * vocab, nullptr, vocab};
    Score score = score_row(row, tokens[of.row], of.top, likely + u64{blockIdx.x} * pitch);
    if (threadIdx.x == 0) out[blockIdx.x] = score;
}
