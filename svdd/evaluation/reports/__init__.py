"""One self-contained HTML page about one or several runs: pictures, rewards, traces, settings and cost."""
