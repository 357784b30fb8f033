"""The public gRPC server: from requests as clients write them to token ids, and back to text."""
