"""One page about saved runs: tables, curves, distributions and lanes, to be opened in any browser or printed."""
