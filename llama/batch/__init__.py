"""Files of prompts: lines in, lines out, resumed where a run was ended."""
