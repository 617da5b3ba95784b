"""Output for people: documents in colours, histograms, charts, and the progress of a run. Takes numbers and text,
returns something to print or a file.

In reading order: header (a run before it starts), progress (while it goes on), metrics (metrics.jsonl, which the others
are fed from), run_folder (run.toml, status.json), chart (loss.png), trackers, report and serve (a run's page,
report.html); plan_page (for `sft plan`); documents and lengths (for `sft inspect`). Nothing here decides or changes
anything.
"""
