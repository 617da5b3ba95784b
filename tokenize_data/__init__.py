"""JSONL to Arrow shards: everything between a user's files and documents of token ids with roles.

Belongs here: reading rows, chat templates, token ids, shards and their reader. Does not belong here: torch, or anything
of `sft`.

In reading order: errors, bases (checkpoints.toml), tokenizer, files (that only their owner reads), streams (a file's
bytes), rows (CSV, JSON, Parquet to lines), folders and hub_data (which files), sources (files to chunks of lines),
dataset with columns (what a data set is; dataset_info for LLaMA-Factory's), records with formats and fields (lines to
messages), chat, skeleton, turn_by_turn, thoughts and templates (messages to text with spans), plain (without a
template), encode (text to ids and roles; fast_bpe and fast_words are quicker ways to the same ids), convert (all of it,
for one chunk), pool (several at once; ray_pool on a cluster),
arrow_files, index, shards and manifest (what lies on disk), lock, drawn, split, choose and tally (before and while),
build (one data set), stage (the whole run), stale, reader (what training opens), recipe, describe (what people see),
cli. The folder jinja has the packaged templates.
"""

__version__ = "0.1.0"
