"""A run, or several beside each other, as a page to look at: what is drawn, how, and the page around it."""
