"""What a run says of itself: metrics, events, progress, trackers, its environment, and one page that shows it all."""
