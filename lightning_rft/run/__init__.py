"""One run of the loop: what it is set to, how it begins and resumes, and who drives it."""
