"""What every room uses: trees, results, the door, loops, linear algebra."""
