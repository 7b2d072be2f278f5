"""Generation: an open conversation -> text, with everything that several share computed once."""
