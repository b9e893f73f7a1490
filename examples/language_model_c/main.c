// Continues a prompt of token ids: next_tokens DIRECTORY 1 2 3
#include <stdio.h>
#include <stdlib.h>

#include "bitlab.h"

static int failed(bitlab_status status) {
  if (status != BITLAB_OK) fprintf(stderr, "%s\n", bitlab_last_error());
  return status != BITLAB_OK;
}

int main(int argc, char** argv) {
  if (argc < 3) return 2;
  bitlab_model* model = NULL;
  bitlab_session* session = NULL;
  bitlab_model_info info;
  if (failed(bitlab_model_open(argv[1], 1, 0, NULL, &model))) return 1;
  if (failed(bitlab_model_describe(model, &info))) return 1;
  if (failed(bitlab_session_new(model, 0, BITLAB_CACHE_FLOAT16, &session))) return 1;

  int64_t count = argc - 2;
  int32_t* tokens = malloc((size_t)count * sizeof *tokens);
  float* logits = malloc((size_t)info.vocab_size * sizeof *logits);
  for (int64_t i = 0; i < count; ++i) tokens[i] = atoi(argv[i + 2]);
  for (int i = 0; i < 8; ++i) {
    const bitlab_input input = {session, tokens, count, BITLAB_LOGITS_LAST, logits, info.vocab_size};
    if (failed(bitlab_forward(model, &input, 1, NULL, NULL))) return 1;
    int32_t best = 0;
    for (int32_t token = 1; token < info.vocab_size; ++token) {
      if (logits[token] > logits[best]) best = token;
    }
    printf("%d ", best);
    tokens[0] = best;
    count = 1;
  }
  printf("\n");
  free(logits);
  free(tokens);
  bitlab_session_free(session);
  bitlab_model_free(model);
  return 0;
}
