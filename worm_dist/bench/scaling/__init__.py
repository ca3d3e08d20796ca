"""Bytes, messages and step times as the number of ranks grows, beside what ``plan`` estimates."""
