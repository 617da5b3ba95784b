"""What a tuned model is worth: its answers, how likely it finds the right ones, scores, and what a judge says.

In reading order: models (what MODEL_DIR means), questions (rows to ask, read as in training), decode (batches with a KV
cache), client and server (the same through an OpenAI-compatible server), answers (a file of answers that goes on where
it was interrupted) and lines (such files), likelihood (the training loss on answers, and choices), words and choices
(scores of one answer), scores (of a data set, with intervals and differences), evaluation (all of it for several models
and data sets), tables (for people), judge. Does not belong here: how rows are read and rendered, which is
`tokenize_data`; pages about runs, which are `observe`.
"""
