"""Rows -> examples: what people have in their files, as token ids with labels."""
