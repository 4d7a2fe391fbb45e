"""What a run tells about itself when asked, or when it breaks: profiles, memory, host synchronisations, garbage collection."""
