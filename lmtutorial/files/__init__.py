"""Files from elsewhere: which there are, how they are fetched and checked, where they are kept."""
