"""What runs next: requests, pages, the scheduler, the programs and the step loop."""
