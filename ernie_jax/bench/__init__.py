"""How fast a model runs here, held against what this machine's memory and arithmetic allow."""
