"""One module per assessment: which prompts are asked, and how the answers become scores."""
