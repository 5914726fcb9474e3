"""What every floor uses: files, progress, the Hub."""
